"""`longvlm extract` and `longvlm train`. Imports stand inside, as in `longvlm_cli.app`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def extract_command(
    videos: Annotated[list[Path], typer.Argument(help="Video files, folders of them, or .txt lists of paths.")],
    model: Annotated[str, typer.Option("--model", "-m", envvar="LONGVLM_MODEL", help="Checkpoint folder or Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of features; one that was begun before is gone on with.")],
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames taken from a video; default: the model's.")] = (
        None
    ),
    fps: Annotated[float | None, typer.Option(help="Instead: frames taken per second.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="With --fps: at most so many.")] = None,
    dtype: Annotated[str, typer.Option(help="To compute in: float32, bfloat16, float16, or auto: as saved.")] = "auto",
    shard_size: Annotated[int, typer.Option(min=1, help="Size of a shard, in MB.")] = 64,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Encode many videos once, for training. `accelerate launch -m longvlm extract ...` uses several processes."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f'--dtype "{dtype}" is not known; use auto, float32, bfloat16 or float16')
    if num_frames is not None and fps is not None:
        raise ValueError(f"--num-frames {num_frames} and --fps {fps} exclude each other")
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from longvlm.features.extract import extract_features
    from longvlm.registration import LongVLMForConditionalGeneration, LongVLMProcessor
    from longvlm_cli.ask import show_warnings_in_one_line

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    show_warnings_in_one_line(sys.stderr)
    state = PartialState(cpu=not torch.accelerator.is_available())
    options = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
    report = extract_features(
        videos,
        out,
        model=LongVLMForConditionalGeneration.from_pretrained(model, dtype=dtype).eval().to(state.device),
        processor=LongVLMProcessor.from_pretrained(model),
        video_options={name: value for name, value in options.items() if value is not None},
        shard_bytes=shard_size * 10**6,
        progress=not quiet,
    )
    if state.is_main_process:
        print(report, file=sys.stderr)
        print(out)


def train_command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML or JSON file of options; see docs/training.md.")],
) -> None:
    """Fine-tune a model. Any option of the file can be given as a flag too: --learning_rate 1e-4."""
    if not config.is_file():
        raise ValueError(f"{config}: no such file")
    from longvlm.training.train import main

    main([str(config), *context.args])
