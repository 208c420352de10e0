"""The training loop of longvlm-tiny's two stages: transformers' `Trainer`, resumed where it was stopped.

The models here return more than a loss (how often the object was named, the loss of each kind of question); the
numbers are averaged and logged beside it.
"""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from longvlm.training.trainer import last_whole_checkpoint


class ScaffoldTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seen: defaultdict[str, list[Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self._seen[name].append(value.detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= {name: round(torch.stack(values).nanmean().item(), 4) for name, values in self._seen.items()}
            self._seen.clear()
        super().log(logs, *args, **kwargs)

    # The output layer shares the embeddings: safetensors can write that, transformers does so for its own models only.
    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_model(model or self.model, str(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))


def fit(model: nn.Module, dataset: IterableDataset, collate, folder: Path, **options) -> None:
    """Trains `model` in place; `folder` keeps checkpoints, so that the same call resumes after an interruption."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        # After an interruption the data come from another seed: making data only to skip it takes as long as training.
        ignore_data_skip=True,
        report_to=[],
        **options,
    )
    trainer = ScaffoldTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))


def steps_done(folder: Path) -> int:
    checkpoint = last_whole_checkpoint(folder)
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
