"""A picture of how the patches of a video were merged into tokens, as `longvlm inspect` draws it.

Each segment has two rows: the frames as the encoder gets them, and the same frames with every patch in the mean colour
of all patches that share its token, and lines between patches of different tokens. The language model cannot see what
the lower row has lost.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from longvlm.files import atomic_write
from longvlm.modeling_longvlm.plain_numbers import whole_number

SIDE, GAP, MARGIN, HEADER = 160, 6, 96, 58
BACKGROUND, INK, LINE = (250, 250, 248), (40, 40, 40), (255, 255, 255)


@torch.no_grad()
def draw_merging(
    engine,
    video,
    out: Path,
    *,
    segments: int = 6,
    frames: int = 5,
    **video_options,
) -> dict[str, int]:
    """Draws `segments` segments of the video, `frames` frames of each, evenly chosen, to a PNG file.

    Args:
        engine: a `LongVLMEngine`.
        video: a path, a URL, or a video that was opened with `open_video`.
        video_options: of the video processor: `num_frames`, `fps`, `video_start`, `video_end`...

    Returns:
        The numbers of the video: `frames`, `segments`, `patches`, `local_tokens`, `global_tokens`.

    Raises:
        VideoDecodeError, ValueError, OSError: one line about what the user can change.
    """
    segments, frames = whole_number("segments", segments, 1), whole_number("frames", frames, 1)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} is not a PNG file name; it must end in .png")
    processor, config = engine.processor.video_processor, engine.model.config
    as_shown = {"do_rescale": False, "do_normalize": False}
    seen = processor(video, return_metadata=True, return_tensors="pt", **as_shown, **video_options)
    pixels = seen["pixel_values_videos"][0]  # (T, 3, H, W), 0 to 255
    as_given = {"do_sample_frames": False, "do_resize": False, "do_center_crop": False}
    normalised = processor(pixels.to(torch.uint8), return_tensors="pt", **as_given)["pixel_values_videos"][0]
    assignment = engine.model.model.get_token_assignment(normalised).cpu()  # (T, N)

    rows, columns = _grid(config, pixels)
    merged = _paint_tokens(pixels, assignment, rows, columns)
    times = seen["video_metadata"][0].timestamps or [None] * len(pixels)
    k = config.frames_per_segment
    parts = list(range(0, len(pixels), k))
    shown = [parts[i] for i in _evenly(len(parts), segments)]
    numbers = {
        "frames": len(pixels),
        "segments": len(parts),
        "patches": assignment.numel(),
        "local_tokens": int(assignment.max()) + 1,
        "global_tokens": config.num_global_tokens,
    }
    picture = _draw(
        Path(getattr(video, "name", video)).name,
        numbers,
        pixels,
        merged,
        assignment,
        times,
        shown,
        k,
        frames,
        (rows, columns),
    )
    with atomic_write(out) as partial:
        picture.save(partial)
    return numbers


def _grid(config, pixels: torch.Tensor) -> tuple[int, int]:
    patch = config.vision_config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def _paint_tokens(pixels: torch.Tensor, assignment: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`(T, 3, H, W)` -> `(T, rows, columns, 3)`: each patch in the mean colour of its token's patches."""
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, (rows, columns)).flatten(2).transpose(1, 2)  # (T, N, 3)
    tokens = int(assignment.max()) + 1
    sums = torch.zeros(tokens, 3).index_add(0, assignment.flatten(), colours.flatten(0, 1))
    sizes = torch.bincount(assignment.flatten(), minlength=tokens)[:, None]
    return (sums / sizes)[assignment].view(len(pixels), rows, columns, 3)


def _evenly(total: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, count))})


def _draw(name, numbers, pixels, merged, assignment, times, shown, k, frames, grid) -> Image.Image:
    columns = min(frames, k, len(pixels))
    picture = Image.new(
        "RGB", (MARGIN + columns * (SIDE + GAP) + GAP, HEADER + len(shown) * (2 * SIDE + 34)), BACKGROUND
    )
    draw = ImageDraw.Draw(picture)
    small, large = ImageFont.load_default(size=12), ImageFont.load_default(size=16)
    draw.text((GAP * 2, 8), name if len(name) < 80 else name[:77] + "...", INK, font=large)
    draw.text(
        (GAP * 2, 32),
        f"{numbers['frames']} frames, {numbers['patches']:,} patches  ->  {numbers['global_tokens']} global + "
        f"{numbers['local_tokens']} local tokens in {numbers['segments']} segments",
        INK,
        font=small,
    )
    top = HEADER
    for first in shown:
        length = min(k, len(pixels) - first)
        tokens = len(assignment[first : first + length].unique())
        label = f"segment {first // k + 1}\n{length} frames\n{tokens} tokens"
        draw.multiline_text((GAP * 2, top + 18), label, INK, font=small, spacing=5)
        for column, offset in enumerate(_evenly(length, columns)):
            frame, left = first + offset, MARGIN + column * (SIDE + GAP)
            when = f"{times[frame]:.1f} s" if times[frame] is not None else f"frame {frame}"
            draw.text((left, top), when, INK, font=small)
            array = pixels[frame].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
            picture.paste(Image.fromarray(array).resize((SIDE, SIDE)), (left, top + 16))
            painted = merged[frame].round().clamp(0, 255).to(torch.uint8).numpy()
            patches = Image.fromarray(painted).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            _draw_borders(patches, assignment[frame].view(*grid))
            picture.paste(patches, (left, top + 16 + SIDE + 2))
        top += 2 * SIDE + 34
    return picture


def _draw_borders(picture: Image.Image, index: torch.Tensor) -> None:
    """A line wherever neighbouring patches belong to different tokens."""
    draw = ImageDraw.Draw(picture)
    rows, columns = index.shape
    xs = [round(SIDE * c / columns) for c in range(columns + 1)]
    ys = [round(SIDE * r / rows) for r in range(rows + 1)]
    for r, c in (index[:, 1:] != index[:, :-1]).nonzero().tolist():
        draw.line([(xs[c + 1], ys[r]), (xs[c + 1], ys[r + 1])], LINE)
    for r, c in (index[1:] != index[:-1]).nonzero().tolist():
        draw.line([(xs[c], ys[r + 1]), (xs[c + 1], ys[r + 1])], LINE)
