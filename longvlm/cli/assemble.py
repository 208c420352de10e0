"""`longvlm assemble`: a vision encoder and a language model become one checkpoint."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longvlm_cli.options import (
    OUT_HELP,
    Dtype,
    Order,
    Overwrite,
    Placement,
    Progress,
    Projector,
    Quiet,
    Similarity,
    WeightsDtype,
    silence_libraries,
)


def assemble_command(
    language: Annotated[str, typer.Option(help="Causal language model: folder, Hub id, or GGUF file.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder: folder, Hub id, or open_clip:MODEL/TAG_OR_FILE.")
    ] = None,
    vision_config: Annotated[
        Path | None, typer.Option(help="config.json of an untrained vision encoder, instead of --vision.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file within --language.")] = None,
    dtype: WeightsDtype = Dtype.auto,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square frames, in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Number of frames taken from a video (100).")] = None,
    frames_per_segment: Annotated[int, typer.Option(min=1, help="Number of frames per segment (K).")] = 10,
    tokens_per_segment: Annotated[
        int, typer.Option(min=1, help="Number of tokens a segment is merged into (M).")
    ] = 30,
    num_global_layers: Annotated[
        int, typer.Option(help="Number of last hidden states whose [CLS] tokens become the global tokens (E).")
    ] = 5,
    vision_feature_layer: Annotated[int, typer.Option(help="Hidden state the patches are taken from.")] = -2,
    merge_schedule: Annotated[
        str | None, typer.Option(help="Number of pairs merged in each step, such as 1280,640,320. Default: halving.")
    ] = None,
    merge_similarity: Annotated[
        Similarity, typer.Option(help="Similarity of the released code (mean_head) or of the paper (per_head).")
    ] = Similarity.mean_head,
    merge_num_heads: Annotated[
        int | None, typer.Option(help="Number of heads in the matching (C). Default: the encoder's.")
    ] = None,
    merge_order: Annotated[
        Order, typer.Option(help="Order of a segment's tokens: as in the released code (matching), or by time.")
    ] = Order.matching,
    global_placement: Annotated[Placement, typer.Option(help="Where the global tokens go.")] = Placement.prefix,
    projector_type: Annotated[Projector, typer.Option(help="Projector from the encoder's width to the LLM's.")] = (
        Projector.linear
    ),
    vision_chunk_frames: Annotated[int, typer.Option(help="Number of frames encoded at a time.")] = 16,
    preset: Annotated[
        str | None, typer.Option(help="Resize frames as CLIP does (clip) or as the released code does (original).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for random weights.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a checkpoint from a vision encoder and a causal language model. Its projector still has to be trained."""
    from longvlm.conversion.assemble import assemble

    silence_libraries()
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
        dtype=dtype.value,
        image_size=image_size,
        video_options=video_options,
        overwrite=overwrite,
        seed=seed,
        progress=Progress(disable=quiet),
        **method,
    )
    untrained = "the vision encoder and the projector are" if vision is None else "the projector is"
    print(f"longvlm: note: {untrained} untrained", file=sys.stderr)
    print(folder)


def _schedule(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f'`merge_schedule` "{text}" is not a list of whole numbers such as 1280,640,320') from None
