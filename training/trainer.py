"""transformers' `Trainer` with what LongVLM needs: rows grouped by length, batches without any video, and the
embeddings of the video tokens. It resumes from complete checkpoints only.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from longvlm.files import read_json_object
from longvlm.training.added_token_rows import (
    restore_token_rows,
    save_token_rows,
    with_token_rows_in_table,
    write_to_table,
)
from longvlm.training.tuning import PROJECTOR_FILE, save_projector


class _WriteToTable(TrainerCallback):
    """After each step, since with tied embeddings the output layer reads the table."""

    def __init__(self, model):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        write_to_table(self.model)


class LengthSampler(Sampler[int]):
    """Puts rows of similar length together. The order depends on the seed and the epoch alone, so that training can be
    resumed in any epoch."""

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
    """Cuts labels, and with them logits, to start where the first answer of the batch starts. The loss is the same.

    What comes before is mostly video, and logits over the vocabulary for each of its tokens cost time and memory.

    Args:
        inputs: for the model, with `labels` int64 `(batch, length)`, -100 where there is no loss.

    Returns:
        The same, with `labels` `(batch, kept)` and `logits_to_keep` = kept; all of them if there is no label.
    """
    labels = inputs["labels"]
    answered = (labels != -100).any(0).nonzero()
    # A label is predicted by the position before it.
    first = max(int(answered[0]) - 1, 0) if len(answered) else 0
    return {**inputs, "labels": labels[:, first:], "logits_to_keep": labels.shape[1] - first}


class LongVLMTrainer(Trainer):
    """
    Takes the arguments of `Trainer`; `model` comes from `prepare_model`, `train_dataset` is a `VideoChatDataset`.

    Args:
        save_projector_file: write `projector.safetensors` next to each saved model.
    """

    label_smoother: Any

    def __init__(self, *args, save_projector_file: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_projector_file = save_projector_file
        if self.label_smoother is not None:
            # Trainer decides by the model's name whether labels are shifted, and it does not know this model.
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        # No process holds the whole table then: only the collected state dict can be changed.
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not self.is_sharded:
            self.add_callback(_WriteToTable(self.model))

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
        inputs = {**inputs, "use_cache": False}  # each batch is seen once
        if model.training and "labels" in inputs:
            inputs = from_first_answer(inputs)
        loss, rest = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and not self.is_fsdp_enabled:
            # Parts that a batch does not use need a gradient of 0, since processes wait for each other's gradients.
            # (FSDP does not wait for these, and its shards do not mix with a plain loss.)
            idle = [
                parameter.sum() * 0.0
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and ("vision_tower" in name or (not has_video and "projector" in name))
            ]
            loss = loss + sum(idle)
        return (loss, rest) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None:
            state_dict = with_token_rows_in_table(state_dict, self.model.config)
        elif not self.is_sharded:
            write_to_table(self.model)
        super()._save(output_dir, state_dict=state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if not self.is_sharded and self.args.should_save:
            if folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # for resuming; the result does not need it
                save_token_rows(self.model, folder)
            if self.save_projector_file:
                save_projector(self.model, folder / PROJECTOR_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_sharded:
            restore_token_rows(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if not self.is_sharded:
            restore_token_rows(self.model, self.state.best_model_checkpoint)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The latest complete checkpoint in a folder, if any. One that was cut short by a kill has no readable state."""
    numbered = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        try:
            state = read_json_object(checkpoint / "trainer_state.json")  # Trainer writes it last
            if isinstance(state.get("global_step"), int):
                numbered.append((int(checkpoint.name.split("-")[1]), str(checkpoint)))
        except (OSError, ValueError):
            continue
    return max(numbered)[1] if numbered else None


__all__ = ["LengthSampler", "LongVLMTrainer", "from_first_answer", "last_whole_checkpoint"]
