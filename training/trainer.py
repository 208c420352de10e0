"""transformers' `Trainer` with what LongVLM needs: rows grouped by their lengths, batches without any video, the
embedding rows of the video tokens, and whole checkpoints only when it goes on.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from longvlm.training.tuning import (
    PROJECTOR_FILE,
    restore_rows,
    save_projector,
    save_rows,
    store_rows,
    with_stored_rows,
)


class _StoreRows(TrainerCallback):
    """After each step: with tied embeddings the output layer reads the table."""

    def __init__(self, model):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        store_rows(self.model)


class LengthSampler(Sampler[int]):
    """Rows of like length together, in an order that depends on the seed and the epoch alone: so training can be
    gone on with in any epoch."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def from_first_answer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Labels, and with them logits, from where the first row begins to answer: the same loss.

    What stands before is mostly video, and a vocabulary of logits for each of its tokens costs time and memory.

    Args:
        inputs: of the model, with `labels` int64 `(batch, length)`, -100 where there is no loss.

    Returns:
        The same, with `labels` `(batch, kept)` and `logits_to_keep` = kept; all of them if there is no label.
    """
    labels = inputs["labels"]
    answered = (labels != -100).any(0).nonzero()
    # A label is read from the logits one before.
    first = max(int(answered[0]) - 1, 0) if len(answered) else 0
    return {**inputs, "labels": labels[:, first:], "logits_to_keep": labels.shape[1] - first}


class LongVLMTrainer(Trainer):
    """
    Takes what `Trainer` takes; `model` is what `prepare_model` gave, `train_dataset` a `VideoChatDataset`.

    Args:
        save_projector_file: also write `projector.safetensors` with each checkpoint.
    """

    label_smoother: Any

    def __init__(self, *args, save_projector_file: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_projector_file = save_projector_file
        if self.label_smoother is not None:
            # Trainer knows by the model's name whether labels are of the next token, and does not know this one.
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        # Then no process has the table, and only the collected state dict can be written to.
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not self.is_sharded:
            self.add_callback(_StoreRows(self.model))

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if self.args.train_sampling_strategy == "group_by_length" and lengths is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthSampler(lengths, batch_size, seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        has_video = "pixel_values_videos" in inputs or "video_features" in inputs
        inputs = {**inputs, "use_cache": False}  # each batch is read once
        if model.training and "labels" in inputs:
            inputs = from_first_answer(inputs)
        loss, rest = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and not self.is_fsdp_enabled:
            # A part that a batch does not use still has to have a gradient, of 0: processes wait for each other's.
            # (FSDP does not wait for those, and its shards do not mix with a plain loss.)
            idle = [
                parameter.sum() * 0.0
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and ("vision_tower" in name or (not has_video and "projector" in name))
            ]
            loss = loss + sum(idle)
        return (loss, rest) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None:
            state_dict = with_stored_rows(state_dict, self.model.config)
        elif not self.is_sharded:
            store_rows(self.model)
        super()._save(output_dir, state_dict=state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if not self.is_sharded and self.args.should_save:
            if folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # to go on from; the result needs none
                save_rows(self.model, folder)
            if self.save_projector_file:
                save_projector(self.model, folder / PROJECTOR_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_sharded:
            restore_rows(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if not self.is_sharded:
            restore_rows(self.model, self.state.best_model_checkpoint)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The latest checkpoint that was written to its end; one that a kill cut short has no readable state."""
    numbered = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        try:
            # Trainer writes this last.
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            numbered.append((int(checkpoint.name.split("-")[1]), str(checkpoint)))
            assert isinstance(state["global_step"], int)
        except (OSError, ValueError, KeyError):
            continue
    return max(numbered)[1] if numbered else None


__all__ = ["LengthSampler", "LongVLMTrainer", "from_first_answer", "last_whole_checkpoint"]
