"""How much faster than decoding a video whole are the 100 frames that LongVLM needs? All ways in one run.

    python benchmarks/video_decoding.py [--minutes 60] [--gop 250] [--b-frames 3] [--size 320x180] [--json FILE]

A video is made first (its frames show their own numbers), then each way decodes the same 100 frames, resized to
224 x 224: ours with one and two readers, with and without the container's index; transformers' way, which decodes the
whole video and keeps the frames asked for; torchcodec, where it is usable. Every way must give the right frames.
Peak memory is the growth of the process above what it had before.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import psutil
import torch
from torchvision.transforms.v2 import functional as tvF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.numbered_videos import read_number, write_video
from longvlm.processing import video_decoding, video_index
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor


def shrink(frame: np.ndarray) -> torch.Tensor:
    """`(H, W, 3)` -> `(3, 224, 224)`, as the video processor does."""
    return tvF.resize(torch.from_numpy(frame).permute(2, 0, 1).contiguous(), [224, 224], antialias=True)


def decode_whole(path: str, wanted: np.ndarray) -> list[torch.Tensor]:
    keep, frames = set(wanted.tolist()), {}
    with av.open(path) as container:
        for position, frame in enumerate(container.decode(video=0)):
            if position in keep:
                frames[position] = shrink(frame.to_ndarray(format="rgb24"))
    return [frames[i] for i in wanted.tolist()]


def decode_ours(path: str, wanted: np.ndarray, **options) -> list[torch.Tensor]:
    return video_decoding.decode_video(path, lambda metadata: wanted, transform=shrink, **options).frames


def decode_ours_from_packets(path: str, wanted: np.ndarray) -> list[torch.Tensor]:
    """As for containers without an index of their own."""
    from_header, video_index._index_from_header = video_index._index_from_header, lambda *args: None
    try:
        return decode_ours(path, wanted, backend="pyav", num_workers=2)
    finally:
        video_index._index_from_header = from_header


def measure(decode, path: str, wanted: np.ndarray, repeats: int) -> tuple[float, float]:
    """-> best seconds, peak MB above the start."""
    process, best, peak = psutil.Process(), float("inf"), 0
    for _ in range(repeats):
        start_memory, running = process.memory_info().rss, threading.Event()

        def watch(start=start_memory, stop=running):
            nonlocal peak
            while not stop.wait(0.005):
                peak = max(peak, process.memory_info().rss - start)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        frames = decode(path, wanted)
        best = min(best, time.perf_counter() - start)
        running.set()
        watcher.join()
        if [read_number(frame) for frame in frames] != (wanted % 65536).tolist():
            raise SystemExit("wrong frames were decoded")
    return best, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--gop", type=int, default=250)
    parser.add_argument("--b-frames", type=int, default=3)
    parser.add_argument("--size", default="320x180")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    count = int(arguments.minutes * 60 * 25)
    wanted = LongVLMVideoProcessor().sample_frames(video_decoding.FrameMetadata(count))

    with tempfile.TemporaryDirectory() as folder:
        print(f"making {count} frames of {width} x {height} ...", flush=True)
        options = {"preset": "ultrafast", "bf": str(arguments.b_frames), "x264-params": "b-adapt=0:scenecut=0"}
        path = write_video(
            os.path.join(folder, "video.mp4"), count, size=(width, height), gop=arguments.gop, options=options
        )
        ways = {
            "whole video": decode_whole,
            "ours, 1 reader": lambda *a: decode_ours(*a, backend="pyav", num_workers=1),
            "ours, 2 readers": lambda *a: decode_ours(*a, backend="pyav", num_workers=2),
            "ours, 2 readers, no index": decode_ours_from_packets,
        }
        if video_decoding.is_torchcodec_usable():
            ways["ours with torchcodec, 1"] = lambda *a: decode_ours(*a, backend="torchcodec", num_workers=1)
            ways["ours with torchcodec, 2"] = lambda *a: decode_ours(*a, backend="torchcodec", num_workers=2)
        decode_ours(path, wanted[:3])  # warm: imports, caches
        results = {}
        for name, decode in ways.items():
            seconds, memory = measure(decode, path, wanted, 1 if decode is decode_whole else arguments.repeats)
            whole = results.get("whole video", {}).get("seconds", seconds)
            results[name] = {"seconds": seconds, "times_faster": whole / seconds, "peak_mb": memory}
            print(
                f"{name:26s} {seconds:7.2f} s   {whole / seconds:5.1f} times faster   peak +{memory:.0f} MB",
                flush=True,
            )
    if arguments.json:
        record = {"arguments": vars(arguments), "av": av.__version__, "cpus": os.cpu_count(), "results": results}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
