"""Stories to look at: an H.264 file, and a sheet of pictures with times and events."""

from fractions import Fraction
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from longvlm.files import atomic_write

from .questions import DOES
from .render import Renderer, iter_frames
from .story import Story


def write_video(story: Story, path, fps: float = 10, size: int = 64, *, crf: int = 18) -> Path:
    """Writes the story as H.264 (yuv420p), frame by frame; memory does not grow with the length.

    The file appears once it is complete. `path` ends in .mp4 or .mkv. Frame `i` shows the time `i / fps`. The frames
    are identical to the byte in every run; x264 does not always encode them to the same bytes.

    Raises:
        ImportError: PyAV is missing.
        ValueError: `size` is odd, which yuv420p does not support, or out of range.
    """
    try:
        import av
    except ImportError:
        raise ImportError("writing video needs PyAV, which is not installed; run: pip install av") from None
    if size % 2:
        raise ValueError(f"size={size} is odd; H.264 in yuv420p needs an even size, such as {size + 1}")
    rate = Fraction(fps).limit_denominator(1000)
    frames = iter_frames(story, fps=fps, size=size)
    with atomic_write(path) as unfinished, av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def contact_sheet(story: Story, path=None, *, pictures_per_event: int = 5, size: int = 128) -> Image.Image:
    """A row per event: its pictures in order with their times, and what happens in words. Saved as `path`, if given.

    The first row shows the backgrounds, each at its middle, whatever happens there.
    """
    title = f"A story of split {story.split} (seed {story.seed}): {len(story.events)} events in {story.duration:g} s"
    legend = "Each row is an event, from left to right. Small grey dots and bars drift about and mean nothing."
    shares = ", ".join(f"{kind} for {share:.0%} of the video" for kind, share in story.scene_shares().items())
    middles = [((scene.start + scene.end) / 2, f": {scene.kind}") for scene in story.scenes]
    rows: list[tuple[str, list[tuple[float, str]]]] = [(f"Behind the objects: {shares}", middles)]
    for number, event in enumerate(story.events, start=1):
        length = event.end - event.start
        times = [event.start + (step + 0.5) / pictures_per_event * length for step in range(pictures_per_event)]
        what = f"{number}. A {event.size} {event.object} {DOES[event.action]}, {event.start:.1f} to {event.end:.1f} s"
        rows.append((what, [(time, "") for time in times]))

    gap, line, header = 6, 16, 46
    most = max(len(marks) for _, marks in rows)
    texts = [legend, *(caption for caption, _ in rows)]
    width = max(gap + (size + gap) * most, *(2 * gap + _length(text) for text in texts))
    row_height = line + size + line + gap
    sheet = Image.new("RGB", (width, header + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, gap), title, fill="black", font_size=14)
    pen.text((gap, gap + 18), legend, fill="dimgrey", font_size=12)
    renderer = Renderer(story, size)
    for top, (caption, marks) in zip(range(header, sheet.height, row_height), rows, strict=True):
        pen.text((gap, top), caption, fill="black", font_size=12)
        for column, (time, name) in enumerate(marks):
            left = gap + column * (size + gap)
            sheet.paste(Image.fromarray(renderer.frame_at(time)), (left, top + line))
            pen.text((left, top + line + size), f"{time:.1f} s{name}", fill="dimgrey", font_size=11)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    return sheet


def _length(text: str) -> int:
    return round(ImageFont.load_default(12).getlength(text))
