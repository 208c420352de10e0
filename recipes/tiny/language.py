"""The language model and the projector of longvlm-tiny, trained on features of stories."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvlm.evaluation.storyline import KINDS
from longvlm.files import atomic_write
from recipes.tiny.lessons import IGNORED, Group, Lesson, Lessons, Plan, PromptMaker, block_mask, unwrap
from recipes.tiny.loop import fit, steps_done
from recipes.tiny.segment_truth import CHANGE, HEADS, KNOWN, NAMED, POSE, SEEN

SEEN_LAYER, CHANGE_LAYER, KNOWN_LAYER, LOOKING_LAYER = 2, 3, 4, 4  # hidden states, and the layer that reads the last
LOOKING_HEADS = 3  # of the looking layer: what one head carries is too narrow for all that may be asked


class LanguageWithHeads(nn.Module):
    """The model, and the linear heads that ask for the truth of each segment; `forward` returns the loss.

    `scaffold`: weight of all that the heads and the attention are taught; `counting`: in it, that of how to count.
    """

    def __init__(self, model, scaffold: float = 1.0, counting: float = 1.0):
        super().__init__()
        width = model.config.text_config.hidden_size
        self.model, self.scaffold, self.counting = model, scaffold, counting
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(sizes.values())))
                for name, sizes in (("seen", SEEN), ("known", KNOWN), ("named", NAMED))
            }
        )
        self.numbers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(numbers)))
                for name, numbers in (("pose", POSE), ("change", CHANGE))
            }
        )

    def forward(
        self,
        input_ids,
        position_ids,
        blocks,
        labels,
        kinds,
        pointers,
        named,
        counted,
        local,
        lengths,
        global_,
        segment_ends,
        events,
        truth,
        motion,
    ):
        outputs = self._run(input_ids, position_ids, blocks, local, lengths, global_)
        wanted = labels[:, 1:]
        there = wanted != IGNORED
        logits = self.model.lm_head(outputs.last_hidden_state[:, :-1][there]).float()
        each = F.cross_entropy(logits, wanted[there], reduction="none")
        kind = kinds[:, 1:][there]
        right = (logits.argmax(-1) == wanted[there]).float()
        results = {"loss": each.mean(), "answers": each.mean()}
        for number, name in enumerate(KINDS):
            results[name] = right[kind == number].mean()
        if self.scaffold and truth.shape[1]:
            losses = self._scaffold(outputs.hidden_states, segment_ends, truth)
            # What an object does takes longest to learn.
            total = torch.stack(list(losses.values())).sum() + 2 * losses["now_action"]
            results["loss"] = results["loss"] + self.scaffold * 0.2 * total
            results |= losses
            pointing = self._pointing(outputs.hidden_states[LOOKING_LAYER], blocks, pointers, segment_ends, events)
            counting = self._counting(outputs.hidden_states[LOOKING_LAYER], blocks, counted, segment_ends, events)
            naming = self._naming(outputs.hidden_states[LOOKING_LAYER], named, segment_ends, truth)
            pose, change = self._motion(outputs.hidden_states, segment_ends, motion)
            taught = pointing + self.counting * counting + naming + 2 * pose + 4 * change
            results["loss"] = results["loss"] + self.scaffold * taught
            results |= {"pointing": pointing, "counting": counting, "naming": naming, "pose": pose, "change": change}
        return results

    @torch.no_grad()
    def right_answers(self, batch: Mapping[str, Tensor]) -> list[tuple[str, bool]]:
        """Kind of each question of a packed batch, and whether a greedy answer would be right in every token."""
        names = ("input_ids", "position_ids", "blocks", "local", "lengths", "global_")
        hidden = self._run(*(batch[name] for name in names)).last_hidden_state
        said = self.model.lm_head(hidden[:, :-1]).argmax(-1)  # (batch, length - 1)
        results = []
        for row in range(len(said)):
            labels, blocks, kinds = (batch[name][row, 1:] for name in ("labels", "blocks", "kinds"))
            for block in range(1, int(blocks.max()) + 1):
                where = (blocks == block) & (labels != IGNORED)
                kind = KINDS[int(kinds[where][0])]
                results.append((kind, bool((said[row][where] == labels[where]).all())))
        return results

    def _run(self, input_ids, position_ids, blocks, local, lengths, global_):
        cut = tuple(tokens[:length].float() for tokens, length in zip(local, lengths.tolist(), strict=True))
        features = {"local_features": cut, "global_features": global_.float()}
        return self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=block_mask(blocks),
            video_features=features if local.shape[1] + global_.shape[1] else None,
            output_hidden_states=True,
            use_cache=False,
        )

    def _pointing(self, states: Tensor, blocks: Tensor, pointers: Tensor, ends: Tensor, events: Tensor) -> Tensor:
        """How surely the first heads of the looking layer look at the right event: minus the log of its share there,
        among all that they give the video. The layer has no rotary positions: this is its real attention."""
        # The event of each token: only the last token of a segment knows all of it.
        of_token = torch.full_like(blocks, -3).scatter(1, ends, events)
        rows, places = (pointers >= 0).nonzero(as_tuple=True)
        right = of_token[rows] == pointers[rows, places, None]  # (questions, length)
        asked = right.any(-1)
        rows, places, right = rows[asked], places[asked], right[asked]
        log_shares = self._log_shares(states, blocks, rows, places, slice(0, LOOKING_HEADS))
        return -log_shares.masked_fill(~right[..., None], float("-inf")).logsumexp(1).mean()

    def _counting(self, states: Tensor, blocks: Tensor, counted: Tensor, ends: Tensor, events: Tensor) -> Tensor:
        """How far the next head is from looking equally at all that is counted and at the first token (a divergence).

        Anywhere from the beginning of an event to that of the next counts as looking at it."""
        latest = torch.where(events == -2, events, events.cummax(1).values)
        of_token = torch.full_like(blocks, -3).scatter(1, ends, latest)
        rows, places = (counted[..., 0] >= 0).nonzero(as_tuple=True)
        log_shares = self._log_shares(states, blocks, rows, places, slice(LOOKING_HEADS, LOOKING_HEADS + 1))[..., 0]
        numbers = torch.arange(counted.shape[-1], device=blocks.device)
        inside = of_token[rows][:, None, :] == numbers[:, None]  # (questions, events, length)
        wanted = (counted[rows, places] == 1) & inside.any(-1)
        of_event = log_shares[:, None].masked_fill(~(inside & wanted[..., None]), float("-inf")).logsumexp(-1)
        count = wanted.sum(-1) + 1
        said = log_shares[:, 0] + of_event.masked_fill(~wanted, 0.0).sum(-1)
        return (-said / count - count.log()).sum() / max(len(rows), 1)

    def _log_shares(self, states: Tensor, blocks: Tensor, rows: Tensor, places: Tensor, heads: slice) -> Tensor:
        """`(questions, length, heads)`: the log of what the looking layer's heads give each token of the video, from
        these places of these rows. The layer has no rotary positions: this is its real attention."""
        layer = self.model.model.language_model.layers[LOOKING_LAYER]
        size = layer.self_attn.head_dim
        states = layer.input_layernorm(states)
        queries = layer.self_attn.q_proj(states[rows, places]).unflatten(-1, (-1, size))[:, None, heads]
        keys = layer.self_attn.k_proj(states).unflatten(-1, (-1, size))[:, :, heads]
        scores = (queries * keys[rows]).sum(-1).float() * size**-0.5
        return scores.masked_fill((blocks[rows] != 0)[..., None], float("-inf")).log_softmax(1)

    def _naming(self, states: Tensor, named: Tensor, ends: Tensor, truth: Tensor) -> Tensor:
        """The same heads read what a question names at its end, and what is there at a segment's end."""
        at_ends = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
        names = list(HEADS)
        there = truth[..., [names.index(name) for name in NAMED]]
        asked = (named != IGNORED).all(-1)
        losses = []
        for where, wanted in ((at_ends.flatten(0, 1), there.flatten(0, 1)), (states[asked], named[asked])):
            logits = self.heads["named"](where).float().split(list(NAMED.values()), dim=-1)
            losses += [F.cross_entropy(some, wanted[:, i], ignore_index=IGNORED) for i, some in enumerate(logits)]
        return torch.stack(losses).mean()

    def _motion(self, hidden_states: Sequence[Tensor], ends: Tensor, motion: Tensor) -> list[Tensor]:
        """Mean squared errors of pose and change."""
        losses, there = [], ~motion[..., 0].isnan()
        for name, layer, wanted in zip(
            self.numbers, (SEEN_LAYER, CHANGE_LAYER), motion.split([len(POSE), len(CHANGE)], -1), strict=True
        ):
            states = hidden_states[layer]
            at_ends = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
            errors = (self.numbers[name](at_ends[there]).float() - wanted[there]).square()
            losses.append(errors.sum() / max(errors.numel(), 1))
        return losses

    def _scaffold(self, hidden_states: Sequence[Tensor], ends: Tensor, truth: Tensor) -> dict[str, Tensor]:
        said: dict[str, Tensor] = {}
        for head, layer, sizes in (("seen", SEEN_LAYER, SEEN), ("known", KNOWN_LAYER, KNOWN)):
            states = hidden_states[layer]
            at_ends = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
            logits = self.heads[head](at_ends).float().split(list(sizes.values()), dim=-1)
            said |= dict(zip(sizes, logits, strict=True))
        return {
            name: F.cross_entropy(said[name].flatten(0, 1), truth[..., i].flatten(), ignore_index=IGNORED)
            for i, name in enumerate(HEADS)
        }


_TRAINED = "trained.pt"


def is_trained(folder: Path) -> bool:
    return (folder / _TRAINED).exists()


def train_language(
    learner: LanguageWithHeads,
    processor,
    lessons: Mapping[Group, Sequence[Lesson]],
    plan: Plan,
    folder: Path,
    *,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    **options,
) -> None:
    """Trains projector and LLM in place, or loads what an earlier call trained.

    Args:
        lessons: group -> lessons; `plan`: (steps, group -> how often it comes), one after the other.
        folder: keeps checkpoints, and at the end the weights.
        options: of `Lessons`.
    """
    if is_trained(folder):
        learner.load_state_dict(torch.load(folder / _TRAINED, weights_only=True))
        return
    dataset = Lessons(lessons, plan, PromptMaker(processor), first_step=steps_done(folder), seed=seed, **options)
    fit(
        learner,
        dataset,
        unwrap,
        folder,
        max_steps=sum(steps for steps, _ in plan),
        learning_rate=learning_rate,
        per_device_train_batch_size=1,
        seed=seed,
    )
    with atomic_write(folder / _TRAINED) as file:
        torch.save(learner.state_dict(), file)
