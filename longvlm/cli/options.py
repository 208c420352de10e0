"""What the commands share: options that mean the same everywhere, progress bars, and warnings on stderr.

Nothing here imports torch or transformers at the top: help must appear at once.
"""

import signal
import sys
import warnings
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO
from urllib.parse import urlsplit

import typer
from tqdm import tqdm

NOTE = (
    "longvlm: warning: no --model was given, so longvlm-tiny is used. It knows only the synthetic Storyline videos; "
    "its output for any other video means nothing"
)
OUT_HELP = "Folder to write. It appears only once it is complete."


class Dtype(StrEnum):
    """A dtype for weights; `auto`: as they were saved."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Similarity(StrEnum):
    """`merge_similarity` of `LongVLMConfig`."""

    mean_head = "mean_head"
    per_head = "per_head"


class Order(StrEnum):
    """`merge_order` of `LongVLMConfig`."""

    matching = "matching"
    time = "time"


class Placement(StrEnum):
    """`global_placement` of `LongVLMConfig`."""

    prefix = "prefix"
    suffix = "suffix"
    none = "none"


class Projector(StrEnum):
    """`projector_type` of `LongVLMConfig`."""

    linear = "linear"
    mlp2x_gelu = "mlp2x_gelu"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="LONGVLM_MODEL",
        help="Checkpoint folder or Hub id. Default: longvlm-tiny, which knows only Storyline's synthetic videos.",
    ),
]
Video = Annotated[str, typer.Argument(metavar="VIDEO", help="A file, a URL, a pipe, or a folder of images.")]
ModelDtype = Annotated[Dtype, typer.Option(help="Dtype of the model; auto: as it was saved.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps... Default: the accelerator, if any.")]
LoadIn4bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Load the language model in 4 bits. Needs bitsandbytes.")
]
LoadIn8bit = Annotated[
    bool, typer.Option("--load-in-8bit", help="Load the language model in 8 bits. Needs bitsandbytes.")
]
NumFrames = Annotated[int | None, typer.Option(min=1, help="Number of frames taken from the video.")]
Fps = Annotated[float | None, typer.Option(help="Frames taken per second of video, instead of --num-frames.")]
MaxFrames = Annotated[int | None, typer.Option(min=1, help="Maximum number of frames with --fps.")]
MaxDownloadBytes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Limit of a download or a pipe, in bytes. Default: LONGVLM_MAX_DOWNLOAD_BYTES, or 8 GiB."
    ),
]
MaxDownloadSeconds = Annotated[
    float | None,
    typer.Option(help="Limit of a download or a pipe, in seconds. Default: LONGVLM_MAX_DOWNLOAD_SECONDS, or 1800."),
]
VideoStart = Annotated[
    float | None, typer.Option(min=0, help="Take frames from here on only, in seconds from the first frame.")
]
VideoEnd = Annotated[float | None, typer.Option(min=0, help="Take frames before this time only, in seconds.")]
VideoStream = Annotated[
    int | None,
    typer.Option(
        min=0, help="Number of the video stream, if a file has several. Default: the one it marks as default."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the contents of --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress. Warnings are still shown.")]
WeightsDtype = Annotated[Dtype, typer.Option(help="Dtype of the written weights; auto: each as in its source.")]


def video_options(**options: Any) -> dict[str, Any]:
    """Options of the video processor, as far as they were given. It checks them; what never fits is said at once."""
    options = {name: value for name, value in options.items() if value is not None}
    if "num_frames" in options and "fps" in options:
        raise ValueError(
            f"`num_frames` {options['num_frames']} and `fps` {options['fps']} exclude each other; give one of them"
        )
    return options


def load_engine(model: str | None, *, quiet: bool = True, **options: Any):
    """
    Loads the model of a command, and says which one it is.

    That it is longvlm-tiny is said under --quiet, too: nothing in its answers shows that it does not know a video.

    Args:
        model: checkpoint folder or Hub id; `None`: longvlm-tiny.
        quiet: do not say that a model that was named is being loaded.
        options: of `longvlm.load`.

    Returns:
        `LongVLMEngine`.
    """
    if model is not None and not quiet:
        print(f"loading {model}", file=sys.stderr, flush=True)
    import longvlm

    show_warnings_in_one_line(sys.stderr)
    silence_libraries()
    if model is None:
        longvlm.tiny_checkpoint()  # raises if it is missing, before the note says that it answers
        print(NOTE, file=sys.stderr, flush=True)
    return longvlm.load(model, **options)


def check_exists(video: str) -> None:
    """Refuses a path that does not exist before spending seconds on imports."""
    if "://" not in video and not video.startswith("data:") and len(video) < 4096 and not Path(video).exists():
        raise ValueError(f"{video}: no such file or directory")


@contextmanager
def opened(engine, video: str, max_bytes: int | None, max_seconds: float | None, *, quiet: bool = False):
    """The video, downloaded once however often it is read. One that is a playlist by name is put together."""
    bars = Progress(disable=quiet)
    options = {"max_download_bytes": max_bytes, "max_download_seconds": max_seconds, "progress": bars}
    allow = {"file", "playlist"} if urlsplit(video).path.lower().endswith((".m3u8", ".m3u")) else {"file"}
    try:
        source = engine.processor.video_processor.open_video(video, allow=allow, **options)
    finally:
        bars.close()
    with source:
        yield source


@contextmanager
def cleaned_up_when_terminated():
    """SIGTERM would end Python at once and leave a half-written folder behind."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def silence_libraries() -> None:
    """Keeps the messages of libraries off stderr."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # retries, one by one


def show_warnings_in_one_line(err: TextIO) -> None:
    """Shows each warning about a video in one line, and hides those of libraries."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"longvlm: warning: {' '.join(str(message).split())}", file=err)

    warnings.showwarning = show
    warnings.simplefilter("ignore")
    from longvlm.processing.video_sources import VideoDecodeWarning

    warnings.simplefilter("always", VideoDecodeWarning)


class Progress:
    """
    Prints `progress(stage, done, total)`: a stage without a count is a line, one with a count is a bar.

    Several bars stay on screen until `close()`: a long video is decoded and encoded alternately, piece by piece.

    Args:
        unit (`str`): what is counted. `"B"`: bytes, which downloads are always counted in.
        disable (`bool`): print nothing; `totals` is still counted.
    """

    NAMES = {"decode": "decoding", "encode": "encoding", "download": "downloading"}  # noqa: RUF012

    def __init__(self, *, unit: str = "frame", disable: bool = False, err: TextIO | None = None):
        self.unit, self.disable, self.err = unit, disable, err if err is not None else sys.stderr
        self.totals: dict[str, int] = {}
        self._bars: dict[str, tqdm] = {}
        self._said = ""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if not total:
            self.close()
            if not self.disable and stage != self._said:
                print(self.NAMES.get(stage, stage), file=self.err, flush=True)
            self._said = stage  # a download of unknown length reports again and again
            return
        self.totals[stage] = total
        unit = "B" if stage == "download" else self.unit
        if stage not in self._bars:
            self._bars[stage] = tqdm(
                total=total,
                desc=self.NAMES.get(stage, stage),
                unit=unit,
                unit_scale=unit == "B",
                position=len(self._bars),
                file=self.err,
                disable=self.disable,
            )
        bar = self._bars[stage]
        bar.total = total
        bar.update(done - bar.n)
        if done >= total and stage != "decode":  # else the bars' clocks would keep running during generation
            self.close()

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()
