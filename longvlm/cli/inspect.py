"""`longvlm inspect`: a picture of how the patches of a video were merged."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.options import (
    Device,
    MaxDownloadBytes,
    MaxDownloadSeconds,
    Model,
    NumFrames,
    Video,
    check_exists,
    load_engine,
    opened,
)


def inspect_command(
    video: Video,
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    model: Model = None,
    num_frames: NumFrames = None,
    segments: Annotated[int, typer.Option(min=1, help="Number of segments shown, evenly spaced.")] = 6,
    frames: Annotated[int, typer.Option(min=1, help="Number of frames shown per segment.")] = 5,
    max_download_bytes: MaxDownloadBytes = None,
    max_download_seconds: MaxDownloadSeconds = None,
    device: Device = None,
) -> None:
    """Draw how the patches of a video are merged into tokens."""
    check_exists(video)
    from longvlm.evaluation.merge_picture import draw_merging

    engine = load_engine(model, device=device)
    with opened(engine, video, max_download_bytes, max_download_seconds) as source:
        numbers = draw_merging(engine, source, out, num_frames=num_frames, segments=segments, frames=frames)
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in numbers.items()), file=sys.stderr)
    print(out)
