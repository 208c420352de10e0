"""Peak memory and time of `longvlm ask` on an hour of video, against a minute of the same video.

    python benchmarks/long_video.py [--hours 1] [--fps 1] [--limit 1.2]

Both are made on the spot (160 x 120, 10 frames a second, H.264), and each is asked about in a process of its own,
whose peak memory the system counts. The model is a small untrained one with frames of 224 x 224, of which 100 are
taken, or with `--fps` that many per second: then the hour has sixty times the frames of the minute. Exit code 1 if the
hour takes more than `--limit` times the memory of the minute.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.numbered_videos import write_video

ROOT = Path(__file__).resolve().parent.parent
FPS, WIDTH, HEIGHT = 10, 160, 120
# Not in this process: what it holds when it starts a child would count as the child's peak.
MAKE_MODEL = """
import sys
import longvlm
from transformers import CLIPVisionConfig

engine = longvlm.load(longvlm.tiny_checkpoint())
vision = CLIPVisionConfig(
    image_size=224, patch_size=14, hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
)
tokens = {name: getattr(engine.model.config, name) for name in (
    "video_token_id", "video_start_token_id", "video_end_token_id"
)}
config = longvlm.LongVLMConfig(vision, engine.model.config.text_config, merge_num_heads=4, **tokens)
model = longvlm.LongVLMForConditionalGeneration(config)
model.save_pretrained(sys.argv[1])
longvlm.LongVLMProcessor.from_config(config, engine.processor.tokenizer).save_pretrained(sys.argv[1])
"""


def moving_square(index: int, width: int, height: int) -> np.ndarray:
    """A square that runs over a slowly changing ground."""
    picture = np.full((height, width, 3), (index // 40 % 256, 80, 120), np.uint8)
    left, top = index * 3 % (width - 20), index // 7 % (height - 20)
    picture[top : top + 20, left : left + 20] = (230, 220, 40)
    return picture


def ask(video: Path, model: Path, *options: str) -> dict:
    """Asks about `video` in a new process; `{"memory": bytes at its peak, "seconds": ..., "frames": ...}`."""
    command = [sys.executable, "-m", "longvlm", "ask", str(video), "What moves?", "--model", str(model), *options]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(
            [*command, "--json", "--quiet", "--max-new-tokens", "8"], stdout=out, cwd=ROOT, env=environment()
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        answer = out.read()
    if child.returncode:
        sys.exit(f"longvlm ask ended with exit code {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "memory": usage.ru_maxrss * unit,
        "seconds": time.perf_counter() - start,
        "asking": json.loads(answer)["seconds"],
        "frames": json.loads(answer)["frames"],
    }


def environment() -> dict[str, str]:
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), str(ROOT)) if part)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--fps", help="frames taken per second, instead of 100 in all")
    parser.add_argument("--limit", type=float, default=1.2, help="largest ratio of the two peaks")
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON object")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(
            [sys.executable, "-c", MAKE_MODEL, str(root / "model")], check=True, cwd=ROOT, env=environment()
        )
        lengths = {"minute": 60, "long": round(options.hours * 3600)}
        numbers = {}
        for name, seconds in lengths.items():
            video = root / f"{name}.mp4"
            write_video(
                video, seconds * FPS, size=(WIDTH, HEIGHT), rate=FPS, gop=250, draw=moving_square,
                options={"preset": "ultrafast"},
            )  # fmt: skip
            # The first run also pays for reading torch from the disk: it is not counted.
            sampling = ["--fps", options.fps] if options.fps else []
            runs = [ask(video, root / "model", *sampling) for _ in range(2 if name == "minute" else 1)]
            numbers[name] = {"length": seconds, **runs[-1]}

    ratio = numbers["long"]["memory"] / numbers["minute"]["memory"]
    if options.json:
        print(json.dumps({**numbers, "ratio": ratio}))
    else:
        print(f"{'video':>10} {'frames taken':>13} {'peak memory':>12} {'whole run':>10} {'asking':>8}")
        for row in numbers.values():
            print(
                f"{row['length']:8d} s {row['frames']:13d} {row['memory'] / 2**20:8.0f} MiB "
                f"{row['seconds']:8.1f} s {row['asking']:6.1f} s"
            )
        print(f"memory: {ratio:.2f} times (limit {options.limit})")
    if ratio > options.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
