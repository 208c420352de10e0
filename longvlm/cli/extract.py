"""`longvlm extract`: every video goes through the encoder once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.options import (
    Dtype,
    Fps,
    LoadIn4bit,
    LoadIn8bit,
    MaxFrames,
    Model,
    ModelDtype,
    NumFrames,
    Progress,
    Quiet,
    VideoEnd,
    VideoStart,
    VideoStream,
    load_engine,
    video_options,
)


def extract_command(
    videos: Annotated[list[Path], typer.Argument(help="Video files, folders of videos, or .txt lists of paths.")],
    out: Annotated[Path, typer.Option(help="Folder of features. An interrupted run is resumed.")],
    model: Model = None,
    num_frames: NumFrames = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    video_start: VideoStart = None,
    video_end: VideoEnd = None,
    video_stream: VideoStream = None,
    dtype: ModelDtype = Dtype.auto,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Maximum size of a shard, in MB.")] = 64,
    quiet: Quiet = False,
) -> None:
    """Encode many videos once, for training. `accelerate launch -m longvlm extract ...` uses several processes."""
    options = video_options(
        num_frames=num_frames,
        fps=fps,
        max_frames=max_frames,
        video_start=video_start,
        video_end=video_end,
        video_stream=video_stream,
    )
    import torch
    from accelerate import PartialState

    from longvlm.features.extract import extract_features
    from longvlm.features.failures import FAILED

    state = PartialState(cpu=not torch.accelerator.is_available())
    engine = load_engine(
        model, dtype=dtype.value, device=state.device, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit
    )
    report = extract_features(
        videos,
        out,
        model=engine.model,
        processor=engine.processor,
        video_options=options,
        shard_bytes=shard_size * 10**6,
        progress=Progress(unit="video", disable=quiet),
    )
    if state.is_main_process:
        print(report, file=sys.stderr)
        if report.failed and not report.encoded + report.there_before:
            raise ValueError(f"none of the videos could be read; {out / FAILED} says why")
        print(out)
