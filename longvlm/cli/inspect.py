"""`longvlm inspect`: a picture of how the patches of a video were merged."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.options import (
    Device,
    LoadIn4bit,
    LoadIn8bit,
    Model,
    NumFrames,
    Video,
    check_exists,
    load_engine,
)


def inspect_command(
    video: Video,
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    model: Model = None,
    num_frames: NumFrames = None,
    segments: Annotated[int, typer.Option(min=1, help="Number of segments shown, evenly spaced.")] = 6,
    frames: Annotated[int, typer.Option(min=1, help="Number of frames shown per segment.")] = 5,
    device: Device = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
) -> None:
    """Draw how the patches of a video are merged into tokens."""
    check_exists(video)
    from longvlm.evaluation.merge_picture import draw_merging

    engine = load_engine(model, device=device, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    numbers = draw_merging(engine, video, out, num_frames=num_frames, segments=segments, frames=frames)
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in numbers.items()), file=sys.stderr)
    print(out)
