"""The command `longvlm`. Imports of torch and transformers stand inside the commands, so that help comes at once.

Whatever a user can cause ends in one line on stderr and exit code 2; `LONGVLM_TRACEBACK=1` shows where it came from.
"""

import os
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from longvlm_cli.convert import convert
from longvlm_cli.publish import publish_command
from longvlm_cli.train import extract_command, train_command

app = typer.Typer(
    help="LongVLM: ask questions about long videos.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(convert, name="convert")
app.command("publish")(publish_command)
app.command("extract")(extract_command)
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train_command)

MODEL_HELP = "Checkpoint folder or Hub id; default: longvlm-tiny, which knows only Storyline's synthetic videos."
DTYPE_HELP = "float32, bfloat16, float16, or auto: as saved."


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


def _version(value: bool) -> None:
    if value:
        print(f"longvlm {version('longvlm')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("ask")
def ask_command(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="File, URL, or folder of pictures.")],
    questions: Annotated[
        list[str], typer.Argument(metavar="QUESTION...", help="One or more; - reads them from stdin, one a line.")
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", envvar="LONGVLM_MODEL", help=MODEL_HELP)] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames taken from the whole video.")] = None,
    fps: Annotated[float | None, typer.Option(help="Instead: frames taken per second.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="With --fps: at most so many.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above: sampled.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="With --temperature: nucleus.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the accelerator.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, instead of the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per question, one a line.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr; warnings stay.")] = False,
) -> None:
    """Ask questions about a video; the answers go to stdout."""
    if as_json and stream:
        raise ValueError("--json and --stream exclude each other")
    if num_frames is not None and fps is not None:
        raise ValueError(f"--num-frames {num_frames} and --fps {fps} exclude each other")
    if stream and num_beams > 1:
        raise ValueError(f"--stream cannot be had with --num-beams {num_beams}: beams are decided at the end")
    if top_p is not None and temperature == 0:
        raise ValueError(f"--top-p {top_p} needs --temperature above 0")

    _check_exists(video)
    model = _chosen(model, quiet=quiet)
    from longvlm_cli.ask import ask, show_warnings_in_one_line

    show_warnings_in_one_line(sys.stderr)
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    if temperature > 0:
        generation |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    if system is not None:
        generation["system"] = system
    video_options = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
    ask(
        video,
        _questions(questions),
        model,
        dtype=_dtype(dtype),
        device=device,
        video_options={name: value for name, value in video_options.items() if value is not None},
        generation={name: value for name, value in generation.items() if value is not None},
        seed=seed,
        as_json=as_json,
        stream=stream,
        quiet=quiet,
        out=sys.stdout,
        err=sys.stderr,
    )


@app.command("inspect")
def inspect_command(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="File, URL, or folder of pictures.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    model: Annotated[str | None, typer.Option("--model", "-m", envvar="LONGVLM_MODEL", help=MODEL_HELP)] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames taken from the whole video.")] = None,
    segments: Annotated[int, typer.Option(min=1, help="Segments shown, evenly chosen.")] = 6,
    frames: Annotated[int, typer.Option(min=1, help="Frames shown of each.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the accelerator.")] = None,
) -> None:
    """Draw how the patches of a video are merged into tokens."""
    _check_exists(video)
    model = _chosen(model, quiet=True)
    from transformers.utils import logging

    from longvlm.evaluation.merge_picture import inspect
    from longvlm_cli.ask import show_warnings_in_one_line

    show_warnings_in_one_line(sys.stderr)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    numbers = inspect(video, out, model, num_frames=num_frames, segments=segments, frames=frames, device=device)
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in numbers.items()), file=sys.stderr)
    print(out)


@app.command("assemble")
def assemble_command(
    language: Annotated[str, typer.Option(help="Causal LLM: folder, Hub id, or GGUF file.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder: folder, Hub id, or open_clip:MODEL/TAG_OR_FILE.")
    ] = None,
    vision_config: Annotated[
        Path | None, typer.Option(help="Instead: config.json of an encoder that starts untrained.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file within --language.")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the frames in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames taken from a video (100).")] = None,
    frames_per_segment: Annotated[int, typer.Option(help="K.")] = 10,
    tokens_per_segment: Annotated[int, typer.Option(help="M: tokens that a segment is merged into.")] = 30,
    num_global_layers: Annotated[int, typer.Option(help="E: layers whose [CLS] make the global tokens.")] = 5,
    vision_feature_layer: Annotated[int, typer.Option(help="Layer that the patches are taken from.")] = -2,
    merge_schedule: Annotated[
        str | None, typer.Option(help="Pairs merged in each step, for example 1280,640,320; default: halving.")
    ] = None,
    merge_similarity: Annotated[
        Similarity, typer.Option(help="The released code's (mean_head) or the paper's (per_head).")
    ] = Similarity.mean_head,
    merge_num_heads: Annotated[int | None, typer.Option(help="C; default: the encoder's heads.")] = None,
    merge_order: Annotated[Order, typer.Option(help="Order of a segment's tokens.")] = Order.matching,
    global_placement: Annotated[Placement, typer.Option(help="Where the global tokens go.")] = Placement.prefix,
    projector_type: Annotated[Projector, typer.Option(help="From the encoder's width to the LLM's.")] = (
        Projector.linear
    ),
    vision_chunk_frames: Annotated[int, typer.Option(help="Frames encoded at a time.")] = 16,
    preset: Annotated[
        str | None, typer.Option(help="Frames resized as CLIP does (clip) or as the original does (original).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Make a checkpoint out of any vision encoder and any LLM. Its projector has to be trained."""
    from transformers.utils import logging

    from longvlm.conversion.assemble import assemble

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    method: dict[str, Any] = {
        "frames_per_segment": frames_per_segment,
        "tokens_per_segment": tokens_per_segment,
        "num_global_layers": num_global_layers,
        "vision_feature_layer": vision_feature_layer,
        "merge_schedule": _schedule(merge_schedule),
        "merge_similarity": merge_similarity.value,
        "merge_order": merge_order.value,
        "global_placement": global_placement.value,
        "projector_type": projector_type.value,
        "vision_chunk_frames": vision_chunk_frames,
    }
    if merge_num_heads is not None:
        method["merge_num_heads"] = merge_num_heads
    video_options: dict[str, Any] = {} if num_frames is None else {"num_frames": num_frames}
    if preset is not None:
        video_options["preset"] = preset
    folder = assemble(
        vision,
        language,
        out,
        vision_config=vision_config,
        gguf_file=gguf_file,
        dtype=_dtype(dtype),
        image_size=image_size,
        video_options=video_options,
        overwrite=overwrite,
        seed=seed,
        progress=(lambda step: None) if quiet else (lambda step: print(step, file=sys.stderr, flush=True)),
        **method,
    )
    untrained = "the vision encoder and the projector are" if vision is None else "the projector is"
    print(f"longvlm: note: {untrained} untrained", file=sys.stderr)
    print(folder)


def _chosen(model: str | None, *, quiet: bool) -> str:
    """The model, longvlm-tiny if none is named; says which before the seconds that loading takes.

    That it is longvlm-tiny is said under --quiet, too: answers about a video that it does not know look like others.
    """
    if model is None:
        from longvlm.bundled import NOTE, tiny_checkpoint

        model = str(tiny_checkpoint())
        print(NOTE, file=sys.stderr, flush=True)
    elif not quiet:
        print(f"loading {model}", file=sys.stderr, flush=True)
    return model


def _check_exists(video: str) -> None:
    """Before the seconds that the imports take."""
    if "://" not in video and not video.startswith("data:") and len(video) < 4096 and not Path(video).exists():
        raise ValueError(f"{video}: no such file or directory")


def _questions(questions: list[str]):
    """The questions; - stands for those on stdin, read one by one as they are typed."""
    for question in questions:
        if question != "-":
            yield question
            continue
        for line in sys.stdin:
            if line.strip():
                yield line.strip()


def _schedule(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f'--merge-schedule "{text}" is not a list of whole numbers such as 1280,640,320') from None


def _dtype(name: str) -> str:
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f'--dtype "{name}" is not known; use auto, float32, bfloat16 or float16')
    return name


def _one_line(error: BaseException | str) -> str:
    """What happened, without line breaks; of an error that wraps another, the one inside."""
    if type(error).__name__.startswith("StrictDataclass"):
        error = getattr(error, "__cause__", None) or error
    text = " ".join(str(error).replace("Value error, ", "").split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:600]}..."


def _is_users(error: BaseException) -> bool:
    """Whether a user can cause (and cure) this error."""
    if isinstance(error, (ValueError, OSError, ImportError)):  # also VideoDecodeError, and those of huggingface_hub
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"StrictDataclassError", "OutOfMemoryError", "HfHubHTTPError", "SafetensorError"})


def main() -> None:
    """Entry point of the command."""
    try:
        sys.exit(app(prog_name="longvlm", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `longvlm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if type(error).__name__ == "Abort":
            sys.exit(130)
        if hasattr(error, "format_message"):  # options that typer refuses
            print(f"longvlm: error: {_one_line(error.format_message())}", file=sys.stderr)
            sys.exit(2)
        if os.environ.get("LONGVLM_TRACEBACK") or not _is_users(error):
            raise
        print(f"longvlm: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
