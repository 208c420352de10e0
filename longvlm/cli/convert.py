"""`longvlm convert ...`: checkpoints and features of other code become this package's, and are exported again.

Each command reads its options and calls one function of `longvlm.conversion`.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.options import (
    OUT_HELP,
    Dtype,
    Overwrite,
    Progress,
    Quiet,
    WeightsDtype,
    cleaned_up_when_terminated,
    silence_libraries,
)

convert = typer.Typer(
    help="Convert checkpoints and features of other projects, and export to the original format.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@convert.callback()
def clean_up(context: typer.Context) -> None:
    context.with_resource(cleaned_up_when_terminated())


Out = Annotated[Path, typer.Option(help=OUT_HELP)]


class Layout(StrEnum):
    """Tokens per video: the paper's 305, or the 205 that the released script really makes."""

    paper = "paper"
    released = "released"


@convert.command("original")
def original_command(
    llm: Annotated[str, typer.Option(help="Base LLaMA, or a complete original checkpoint: folder or Hub id.")],
    vision: Annotated[str, typer.Option(help="CLIP model: folder or Hub id (openai/clip-vit-large-patch14).")],
    out: Out,
    delta: Annotated[str | None, typer.Option(help="LLaVA's delta to the base: folder or Hub id.")] = None,
    projector: Annotated[
        Path | None, typer.Option(help="mm_projector.bin. Not needed for a complete checkpoint.")
    ] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="305 tokens per video (paper) or 205 (released). Default: paper.")
    ] = None,
    feature_file: Annotated[
        Path | None, typer.Option(help="Local features (.pkl) that the checkpoint has to match; decides the layout.")
    ] = None,
    dtype: WeightsDtype = Dtype.auto,
    forward_check: Annotated[
        bool, typer.Option("--forward-check/--no-forward-check", help="Run the result on a generated clip.")
    ] = True,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """A checkpoint of the released LongVLM code: base LLaMA + LLaVA's delta + mm_projector.bin + CLIP."""
    from longvlm.conversion.original import convert_original

    silence_libraries()
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
        progress=None if quiet else Progress(unit="B"),
    )
    print(report, file=sys.stderr)
    print(out)


@convert.command("features")
def features_command(
    local: Annotated[Path, typer.Argument(metavar="LOCAL", help="Folder of local features (.pkl).")],
    memory: Annotated[
        Path,
        typer.Argument(
            metavar="MEMORY",
            help="Folder of memory features (.pkl), as the released code calls the global ones; same file names.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of features. An interrupted run is resumed.")],
    num_global_layers: Annotated[
        int, typer.Option(min=0, help="Number of global tokens (E): the last rows of the memory features.")
    ] = 5,
    shard_size: Annotated[int, typer.Option(min=1, help="Maximum size of a shard, in MB.")] = 256,
    quiet: Quiet = False,
) -> None:
    """Convert the released code's feature pickles to feature shards. Bad files are listed in failed.jsonl."""
    from longvlm.conversion.original_features import convert_features

    report = convert_features(
        local,
        memory,
        out,
        num_global_layers=num_global_layers,
        shard_bytes=shard_size * 10**6,
        progress=None if quiet else Progress(unit="video"),
    )
    print(report, file=sys.stderr)
    print(out)


@convert.command("to-original")
def to_original_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="LongVLM checkpoint: folder or Hub id.")],
    out: Out,
    features: Annotated[
        Path | None, typer.Option(help="Folder of feature shards, to be exported as .pkl files as well.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Export to the original format: mm_projector.bin and feature pickles for the released code's tools."""
    from longvlm.conversion.to_original import convert_to_original

    progress = None if quiet else Progress(unit="video")
    convert_to_original(checkpoint, out, features=features, overwrite=overwrite, progress=progress)
    print(out)


@convert.command("open-clip")
def open_clip_command(
    model: Annotated[str, typer.Option(help="Name of the architecture in open_clip: ViT-L-14, ViT-B-32-quickgelu...")],
    pretrained: Annotated[str, typer.Option(metavar="TAG_OR_FILE", help="A tag that open_clip downloads, or a file.")],
    out: Out,
    dtype: WeightsDtype = Dtype.auto,
    allow_torchscript: Annotated[
        bool, typer.Option("--allow-torchscript", help="Also read TorchScript archives. They can run code.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Convert the vision encoder of an open_clip model, with its preprocessing, for `longvlm assemble --vision`."""
    from longvlm.conversion.openclip_vision import convert_open_clip

    silence_libraries()
    convert_open_clip(
        model,
        out,
        pretrained=pretrained,
        dtype=dtype.value,
        allow_torchscript=allow_torchscript,
        overwrite=overwrite,
        progress=Progress(disable=quiet),
    )
    print(out)


@convert.command("llava")
def llava_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="LLaVA-1.5, LLaVA-Lightning or Video-ChatGPT.")],
    out: Out,
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder, if SOURCE neither contains nor names the right one.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="If SOURCE is a delta: the LLaMA it is added to.")] = None,
    projector: Annotated[
        Path | None, typer.Option(help="A separate projector file such as video_chatgpt-7B.bin, instead of SOURCE's.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the written weights; auto: the LLM's own.")] = Dtype.auto,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Number of frames taken from a video (100).")] = None,
    frames_per_segment: Annotated[int, typer.Option(min=1, help="Number of frames per segment (K).")] = 10,
    tokens_per_segment: Annotated[
        int, typer.Option(min=1, help="Number of tokens a segment is merged into (M).")
    ] = 30,
    global_tokens: Annotated[
        bool, typer.Option("--global-tokens", help="Put [CLS] tokens first. The projector has never seen any.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Turn a LLaVA into a LongVLM without training: its projector, its language model, merged video tokens."""
    from longvlm.conversion.llava import convert_llava

    silence_libraries()
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
        progress=Progress(disable=quiet),
    )
    print(out)
