"""`longvlm inspect`: a picture of how the patches of a video were merged."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.options import (
    Device,
    Fps,
    MaxDownloadBytes,
    MaxDownloadSeconds,
    MaxFrames,
    Model,
    NumFrames,
    Video,
    VideoEnd,
    VideoStart,
    VideoStream,
    check_exists,
    load_engine,
    opened,
    video_options,
)


def inspect_command(
    video: Video,
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    model: Model = None,
    num_frames: NumFrames = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    video_start: VideoStart = None,
    video_end: VideoEnd = None,
    video_stream: VideoStream = None,
    segments: Annotated[int, typer.Option(min=1, help="Number of segments shown, evenly spaced.")] = 6,
    frames: Annotated[int, typer.Option(min=1, help="Number of frames shown per segment.")] = 5,
    max_download_bytes: MaxDownloadBytes = None,
    max_download_seconds: MaxDownloadSeconds = None,
    device: Device = None,
) -> None:
    """Draw how the patches of a video are merged into tokens."""
    check_exists(video)
    options = video_options(
        num_frames=num_frames,
        fps=fps,
        max_frames=max_frames,
        video_start=video_start,
        video_end=video_end,
        video_stream=video_stream,
    )
    from longvlm.evaluation.merge_picture import draw_merging

    engine = load_engine(model, device=device)
    with opened(engine, video, max_download_bytes, max_download_seconds) as source:
        numbers = draw_merging(engine, source, out, segments=segments, frames=frames, **options)
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in numbers.items()), file=sys.stderr)
    print(out)
