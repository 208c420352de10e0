"""The language model and the projector of longvlm-tiny, trained on features of stories."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvlm.evaluation.storyline import KINDS
from longvlm.training.tiny.lessons import IGNORED, Group, Lesson, Lessons, Plan, PromptMaker, block_mask, unwrap
from longvlm.training.tiny.loop import fit, steps_done
from longvlm.training.tiny.segment_truth import HEADS, KNOWN, NAMED, SEEN

SEEN_LAYER, KNOWN_LAYER, LOOKING_LAYER = 2, 4, 4  # hidden states, and the layer that reads the last of them


class LanguageWithHeads(nn.Module):
    """The model, and the linear heads that ask for the truth of each segment; `forward` returns the loss."""

    def __init__(self, model, scaffold: float = 1.0):
        super().__init__()
        width = model.config.text_config.hidden_size
        self.model, self.scaffold = model, scaffold
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(sizes.values())))
                for name, sizes in (("seen", SEEN), ("known", KNOWN), ("named", NAMED))
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
        local,
        lengths,
        global_,
        segment_ends,
        events,
        truth,
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
            results["loss"] = results["loss"] + self.scaffold * torch.stack(list(losses.values())).mean()
            results |= losses
            pointing = self._pointing(outputs.hidden_states[LOOKING_LAYER], blocks, pointers, segment_ends, events)
            naming = self._naming(outputs.hidden_states[LOOKING_LAYER], named, segment_ends, truth)
            results["loss"] = results["loss"] + self.scaffold * (pointing + naming)
            results |= {"pointing": pointing, "naming": naming}
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
        """How surely the first head of the looking layer looks at the right event: minus the log of its share there,
        among all that it gives the video. The layer has no rotary positions: this is its real attention."""
        layer = self.model.model.language_model.layers[LOOKING_LAYER]
        size = layer.self_attn.head_dim
        states = layer.input_layernorm(states)
        queries, keys = layer.self_attn.q_proj(states)[..., :size], layer.self_attn.k_proj(states)[..., :size]
        scores = (queries @ keys.mT).float() * size**-0.5  # (batch, length, length)
        # The event of each token: only the last token of a segment knows all of it.
        of_token = torch.full_like(blocks, -3).scatter(1, ends, events)
        right = (of_token[:, None, :] == pointers[:, :, None]) & (pointers >= 0)[:, :, None]
        asked = right.any(-1)
        log_shares = scores.masked_fill((blocks != 0)[:, None, :], float("-inf")).log_softmax(-1)
        return -log_shares.masked_fill(~right, float("-inf"))[asked].logsumexp(-1).mean()

    def _naming(self, states: Tensor, named: Tensor, ends: Tensor, truth: Tensor) -> Tensor:
        """The same heads read what a question names at its end, and what is there at a segment's end."""
        at_ends = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
        names = list(HEADS)
        there = truth[..., [names.index(f"now_{name}") for name in NAMED]]
        asked = (named != IGNORED).all(-1)
        losses = []
        for where, wanted in ((at_ends.flatten(0, 1), there.flatten(0, 1)), (states[asked], named[asked])):
            logits = self.heads["named"](where).float().split(list(NAMED.values()), dim=-1)
            losses += [F.cross_entropy(some, wanted[:, i], ignore_index=IGNORED) for i, some in enumerate(logits)]
        return torch.stack(losses).mean()

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
    done = folder / "trained.pt"
    if done.exists():
        learner.load_state_dict(torch.load(done, weights_only=True))
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
    torch.save(learner.state_dict(), folder / "unfinished.pt")
    (folder / "unfinished.pt").rename(done)
