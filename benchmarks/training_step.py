"""Time of a projector training step from features, against steps of the same LLM trained on text of the same length.

    python benchmarks/training_step.py [--layers 10] [--batch 4] [--segments 5] [--cpu-time] [--limit 1.1]

All are trained by transformers' `Trainer` with its own optimizer, one step each in turns, so that other load on the
machine affects all alike. Ours is what `longvlm train` runs: features are read from shards, chats are rendered and
tokenized, all within the step. The others have their tokens ready:

    full    the whole LLM is trained, on every token of the text
    frozen  the LLM is frozen and one vector, added to its input embeddings, is trained, on every token of the text
    answer  the same, but with logits and loss for as many tokens as our answers have: the same forward pass and the
            same backward pass to the inputs as ours, and nothing else

The LLM has random weights in SmolLM2-135M's shape, by default with a third of its layers, which makes our share of the
time larger than with all of them. Exit code 1 if ours takes more than `--limit` times as long as "full" or "frozen".
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from longvlm import LongVLMConfig, LongVLMForConditionalGeneration, LongVLMProcessor
from longvlm.features.store import FeatureReader, FeatureWriter
from longvlm.processing.processing_longvlm import VIDEO_TOKENS
from longvlm.training.arguments import TuningArguments
from longvlm.training.collator import LongVLMDataCollator
from longvlm.training.data import build_dataset
from longvlm.training.trainer import LongVLMTrainer, from_first_answer
from longvlm.training.tuning import prepare_model

FRAMES_PER_SEGMENT, TOKENS_PER_SEGMENT, GLOBAL_LAYERS, VISION_WIDTH = 10, 30, 5, 1024  # the paper's, with CLIP ViT-L
SIDE, PATCH = 56, 14  # pixels; the encoder is never run


def smollm2_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_155,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_longvlm(layers: int) -> tuple[LongVLMForConditionalGeneration, LongVLMProcessor]:
    """Random weights: SmolLM2's shape behind a small encoder of ViT-L's width."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(VIDEO_TOKENS)})
    patch, start, end = tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS))
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=128,
        num_hidden_layers=GLOBAL_LAYERS,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LongVLMConfig(
        vision_config=vision.to_dict(),
        text_config=smollm2_config(layers).to_dict(),
        frames_per_segment=FRAMES_PER_SEGMENT,
        tokens_per_segment=TOKENS_PER_SEGMENT,
        num_global_layers=GLOBAL_LAYERS,
        merge_num_heads=4,
        video_token_id=patch,
        video_start_token_id=start,
        video_end_token_id=end,
    )
    return LongVLMForConditionalGeneration(config), LongVLMProcessor.from_config(config, tokenizer)


def write_features(folder: Path, videos: int, segments: int) -> None:
    with FeatureWriter(folder, num_global_layers=GLOBAL_LAYERS) as writer:
        for video in range(videos):
            local = torch.randn(segments * TOKENS_PER_SEGMENT, VISION_WIDTH)
            writer.add(f"v_{video}", local, torch.randn(GLOBAL_LAYERS, VISION_WIDTH))


class Clock(TrainerCallback):
    """Seconds from reading an epoch's first batch to the end of its last step."""

    def __init__(self, now: Callable[[], float]):
        self.now = now

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds = self.now() - self.start


def training_arguments(folder: Path, batch: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
    )


def projector_trainer(folder: Path, arguments: TrainingArguments, options) -> LongVLMTrainer:
    model, processor = make_longvlm(options.layers)
    write_features(folder / "features", options.batch, options.segments)
    rows = [{"video": f"v_{i}", "question": "What?", "answer": "A man."} for i in range(options.batch)]
    dataset, _ = build_dataset([rows], processor, features=[FeatureReader(folder / "features")])
    return LongVLMTrainer(
        model=prepare_model(model, TuningArguments()),
        args=arguments,
        data_collator=LongVLMDataCollator(processor),
        train_dataset=dataset,
        processing_class=processor,
    )


def text_trainer(
    arguments: TrainingArguments, options, length: int, *, frozen: bool, labels: int | None = None
) -> Trainer:
    """`labels`: how many tokens at the end have a loss; default: all."""
    model = LlamaForCausalLM(smollm2_config(options.layers))
    if frozen:
        model.requires_grad_(False)
        model.shift = nn.Parameter(torch.zeros(model.config.hidden_size))
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + model.shift)
    tokens = torch.randint(3, model.config.vocab_size, (options.batch, length))
    if labels is not None:
        model.forward = functools.partial(model.forward, logits_to_keep=labels)
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[-labels:] if labels else row}
        for row in tokens
    ]
    return Trainer(model=model, args=arguments, train_dataset=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10, help="layers of the LLM; SmolLM2-135M has 30")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--segments", type=int, default=5, help=f"per video, {TOKENS_PER_SEGMENT} tokens each")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU seconds, for a machine with other load")
    parser.add_argument("--limit", type=float, default=1.1, help="largest ratio of the medians")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    options = parser.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(Path(folder) / "out", options.batch)
        ours = projector_trainer(Path(folder), arguments, options)
        length = ours.train_dataset.lengths[0]
        answer = from_first_answer(ours.data_collator([ours.train_dataset[0]]))["logits_to_keep"]
        trainers = {
            "ours": ours,
            "frozen": text_trainer(arguments, options, length, frozen=True),
            "full": text_trainer(arguments, options, length, frozen=False),
            "answer": text_trainer(arguments, options, length, frozen=True, labels=answer),
        }
        clock = Clock(time.process_time if options.cpu_time else time.perf_counter)
        for trainer in trainers.values():
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(clock)
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(options.rounds + 1):
            for name, trainer in trainers.items():
                trainer.train()
                if number:  # the first round also allocates memory and creates the optimizer's state
                    seconds[name].append(clock.seconds)

    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: medians["ours"] / medians[name] for name in ("frozen", "full", "answer")}
    if options.json:
        print(json.dumps({"length": length, "batch": options.batch, "seconds": seconds, "ratios": ratios}))
    else:
        print(f"batch {options.batch}, {length} tokens, an LLM with {options.layers} layers, {options.rounds} rounds")
        print(f"{'step':>8} {'median':>9} {'fastest':>9} {'slowest':>9}")
        for name, taken in seconds.items():
            print(f"{name:>8} {medians[name]:7.3f} s {min(taken):7.3f} s {max(taken):7.3f} s")
        print(
            f"ours takes {ratios['frozen']:.3f} times as long as the frozen LLM, {ratios['full']:.3f} times as long "
            f"as full training (limit {options.limit}), {ratios['answer']:.3f} times as long as the frozen LLM with "
            f"{answer} labels per row"
        )
    if max(ratios["frozen"], ratios["full"]) > options.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
