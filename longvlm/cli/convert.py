"""`longvlm convert ...`: checkpoints and features of other code become this package's, and back.

Each command only reads its options and calls one function of `longvlm.conversion`; imports stand inside, as in
`longvlm_cli.app`, which also turns errors into one line.
"""

import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

convert = typer.Typer(
    help="Turn checkpoints and features of other code into this package's, and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OUT_HELP = "Folder to write; it appears only when it is whole."


class Dtype(StrEnum):
    """Of the weights that are written; `auto`: each as in its source."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Layout(StrEnum):
    """Tokens of a video: the paper's 305, or the 205 that the released script really makes."""

    paper = "paper"
    released = "released"


@convert.callback()
def clean_up_when_terminated() -> None:
    # SIGTERM would end Python at once, and leave the folder that is being written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@convert.command("original")
def original_command(
    llm: Annotated[str, typer.Option(help="Base LLaMA, or a whole original checkpoint: folder or Hub id.")],
    vision: Annotated[str, typer.Option(help="CLIP model: folder or Hub id (openai/clip-vit-large-patch14).")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    delta: Annotated[str | None, typer.Option(help="LLaVA's delta to the base: folder or Hub id.")] = None,
    projector: Annotated[Path | None, typer.Option(help="mm_projector.bin; not for a whole checkpoint.")] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="305 tokens a video (paper) or 205 (released). Default: paper.")
    ] = None,
    feature_file: Annotated[
        Path | None, typer.Option(help="Local features (.pkl) that the checkpoint shall fit: tells the layout.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: each as in its source.")] = Dtype.auto,
    forward_check: Annotated[
        bool, typer.Option("--forward-check/--no-forward-check", help="Run the result on a generated clip.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """A checkpoint of the released LongVLM code: base LLaMA + LLaVA's delta + mm_projector.bin + CLIP."""
    from longvlm.conversion.original import convert_original

    _only_our_own_lines()
    report = convert_original(
        llm,
        out,
        delta=delta,
        projector=projector,
        vision=vision,
        layout=None if layout is None else layout.value,
        feature_file=feature_file,
        dtype=dtype.value,
        forward_check=forward_check,
        overwrite=overwrite,
        progress=_progress(quiet),
    )
    print(report, file=sys.stderr)
    print(out)


@convert.command("features")
def features_command(
    local: Annotated[Path, typer.Argument(metavar="LOCAL", help="Folder of local features (.pkl).")],
    memory: Annotated[Path, typer.Argument(metavar="MEMORY", help="Folder of memory features (.pkl), same names.")],
    out: Annotated[Path, typer.Option(help="Folder of feature shards; a run that was stopped is gone on with.")],
    num_global_layers: Annotated[int, typer.Option(min=0, help="E: last rows of the memory that are used.")] = 5,
    shard_size: Annotated[int, typer.Option(min=1, help="Size of a shard, in MB.")] = 256,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Feature pickles of the released code become feature shards. Bad files are listed in failed.jsonl."""
    from longvlm.conversion.original_features import convert_features

    report = convert_features(
        local,
        memory,
        out,
        num_global_layers=num_global_layers,
        shard_bytes=shard_size * 10**6,
        progress=_progress(quiet),
    )
    print(report, file=sys.stderr)
    print(out)


@convert.command("to-original")
def to_original_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="LongVLM checkpoint: folder or Hub id.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    features: Annotated[Path | None, typer.Option(help="Folder of feature shards, to be written as .pkl too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """The way back: mm_projector.bin, and feature pickles, that the released code's tools read."""
    from longvlm.conversion.to_original import convert_to_original

    convert_to_original(checkpoint, out, features=features, overwrite=overwrite, progress=_progress(quiet))
    print(out)


@convert.command("open-clip")
def open_clip_command(
    model: Annotated[str, typer.Option(help="open_clip's name of the architecture: ViT-L-14, ViT-B-32-quickgelu...")],
    pretrained: Annotated[str, typer.Option(metavar="TAG_OR_FILE", help="A tag that open_clip downloads, or a file.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: as they are.")] = Dtype.auto,
    allow_torchscript: Annotated[
        bool, typer.Option("--allow-torchscript", help="Read a TorchScript archive too; it can run code.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """The vision tower of an open_clip model, with its preprocessing, for `longvlm assemble --vision`."""
    from longvlm.conversion.openclip_vision import convert_open_clip

    _only_our_own_lines()
    convert_open_clip(
        model,
        out,
        pretrained=pretrained,
        dtype=dtype.value,
        allow_torchscript=allow_torchscript,
        overwrite=overwrite,
        progress=_progress(quiet) or (lambda step: None),
    )
    print(out)


@convert.command("llava")
def llava_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="LLaVA-1.5, LLaVA-Lightning or Video-ChatGPT.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder, where not the one that SOURCE holds or names.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where SOURCE is a delta: the LLaMA it is added to.")] = None,
    projector: Annotated[
        Path | None, typer.Option(help="A projector saved alone, such as video_chatgpt-7B.bin, in place of SOURCE's.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: the language model's own.")] = Dtype.auto,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames taken from a video (100).")] = None,
    frames_per_segment: Annotated[int, typer.Option(help="K.")] = 10,
    tokens_per_segment: Annotated[int, typer.Option(help="M: tokens that a segment is merged into.")] = 30,
    global_tokens: Annotated[
        bool, typer.Option("--global-tokens", help="Put [CLS] tokens in front, which the projector has never seen.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """A LLaVA becomes a LongVLM without training: its projector, its language model, merged video tokens."""
    from longvlm.conversion.llava import convert_llava

    _only_our_own_lines()
    convert_llava(
        source,
        out,
        vision=vision,
        base=base,
        projector=projector,
        dtype=dtype.value,
        video_options=None if num_frames is None else {"num_frames": num_frames},
        frames_per_segment=frames_per_segment,
        tokens_per_segment=tokens_per_segment,
        global_placement="prefix" if global_tokens else "none",
        overwrite=overwrite,
        progress=_progress(quiet) or (lambda step: None),
    )
    print(out)


def _only_our_own_lines() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _progress(quiet: bool) -> Callable[[str], None] | None:
    """Called with a line for each step; `None`: no lines and no bars."""
    return None if quiet else (lambda step: print(step, file=sys.stderr, flush=True))
