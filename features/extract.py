"""`longvlm extract`: videos are encoded once, for any number of trainings.

    report = extract_features(["videos"], "features", model=model, processor=processor)
    FeatureReader("features")["cooking/v_0"].local_features

Several processes (`accelerate launch -m longvlm extract ...`) each take a share of the videos and write it, shard by
shard, into a folder of their own inside `out`. Complete shards are then moved into `out`, whose index is made from the
shards it holds. So whatever is killed at whatever moment, the next run encodes just the videos that no shard has.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from longvlm.features.failures import FAILED, FailureLog, read_failed, write_failed
from longvlm.features.fingerprint import feature_metadata
from longvlm.features.store import SHARD, SHARDS, FeatureReader, FeatureWriter, Window
from longvlm.features.videos import find_videos, window_name
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.modeling_longvlm.modeling_longvlm import video_facts
from longvlm.modeling_longvlm.plain_numbers import whole_number

PART, PARTS = ".part-{:05}", ".part-*"  # one folder per process


@dataclass
class ExtractionReport:
    """How many videos were encoded by this run, had been encoded before, and could not be read."""

    encoded: int = 0
    there_before: int = 0
    failed: int = 0

    def __str__(self) -> str:
        listed = f" (see {FAILED})" if self.failed else ""
        return f"{self.encoded:,} videos encoded, {self.there_before:,} there before, {self.failed:,} failed{listed}"


@torch.no_grad()
def extract_features(
    sources: Sequence[str | Path] | Mapping[str, Any],
    out: str | Path,
    *,
    model,
    processor,
    video_options: Mapping[str, Any] | None = None,
    store_dtype: torch.dtype | None = None,
    shard_bytes: int = 2**26,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExtractionReport:
    """
    Encodes videos into a folder of feature shards. Every process of a launch calls it.

    Args:
        sources: for `find_videos`; or a mapping from names to videos of any kind that the video processor takes.
        out: a folder, new or from an earlier run, whose videos are not encoded again.
        model, processor: a LongVLM in eval mode, on the device to use.
        video_options: options of the video processor (`num_frames`, `fps`, `max_frames`...). With `video_start` or
            `video_end`, each video is stored under its `window_name`; a folder may hold several windows.
        store_dtype: dtype of the features; default: the one that the encoder computes in.
        shard_bytes: a shard is written when that many bytes are encoded; a killed process loses at most as much.
        progress: called as `progress("encode", done, total)` after each video of the first process's share, and only
            in that process; with several processes the stage says so.

    Returns:
        Counts over all processes. A video that cannot be read is listed in `failed.jsonl` with the reason; the next
        run tries it again.

    Raises:
        ValueError: see `find_videos` and `FeatureWriter`; options that no video can have; or a video is stored there
            under the name of another's window.
    """
    # On a machine without accelerators, processes find each other only when told to use the CPU.
    state, out = PartialState(cpu=model.device.type == "cpu"), Path(out)
    options = dict(video_options or {})
    window = _window(options)
    shard_bytes = whole_number("shard_bytes", shard_bytes, 1)
    processor.video_processor.check_options(**options)
    videos = sources if isinstance(sources, Mapping) else find_videos(sources)
    videos = {window_name(name, *window or ()): video for name, video in videos.items()}
    made_by = {
        "num_global_layers": model.config.num_global_tokens,  # none, if the model places none
        "metadata": feature_metadata(model, processor.video_processor, options),
    }
    if state.is_main_process:
        FeatureWriter(out, **made_by).close()
        _adopt_parts(out, made_by)
    state.wait_for_everyone()
    reader = FeatureReader(out)
    for name in videos.keys() & reader.keys():
        if reader.window(name) != window:
            raise ValueError(f'{out} holds another part of a video under the name "{name}"; rename that video')
    done = set(reader)
    missing = [name for name in videos if name not in done]
    share = missing[state.process_index :: state.num_processes]
    part = out / PART.format(state.process_index)
    stage = "encode" if state.num_processes == 1 else f"encode (process 1 of {state.num_processes})"
    state.wait_for_everyone()
    engine = LongVLMEngine(model, processor, cache_bytes=0)
    with FeatureWriter(part, **made_by, shard_bytes=shard_bytes) as writer, FailureLog(part) as failures:
        for number, name in enumerate(share, start=1):
            try:
                features = engine.encode(videos[name], **options)
                tensors = (features.local_features[0], features.global_features[0])
                tensors = tuple(t.to("cpu", store_dtype or t.dtype) for t in tensors)
                facts: dict[str, Any] = {fact: values and values[0] for fact, values in video_facts(features).items()}
                writer.check(name, *tensors, **facts)
            except (ValueError, OSError) as error:
                failures.add(name, error)
            else:  # outside of `try`: a full disk is not the video's fault
                writer.add(name, *tensors, **facts, window=window)
            if progress is not None and state.is_main_process:
                progress(stage, number, len(share))
    state.wait_for_everyone()
    if state.is_main_process:
        _collect_failures(out, set(videos), done)
        _adopt_parts(out, made_by)
    state.wait_for_everyone()
    stored = set(FeatureReader(out))
    encoded = sum(name in stored for name in missing)
    return ExtractionReport(encoded, len(videos) - len(missing), len(missing) - encoded)


def _window(options: Mapping[str, Any]) -> Window | None:
    start, end = options.get("video_start"), options.get("video_end")
    if start is None and end is None:
        return None
    return None if start is None else float(start), None if end is None else float(end)


def _adopt_parts(out: Path, made_by: Mapping[str, Any]) -> None:
    """Moves the complete shards of the processes' folders into `out`, and rebuilds its index."""
    for part in sorted(out.glob(PARTS)):
        lock = FileLock(part / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{out} is being written to by another process") from None
        number = max((int(shard.stem.rsplit("-", 1)[1]) for shard in out.glob(SHARDS)), default=0)
        for shard in sorted(part.glob(SHARDS)):
            number += 1
            os.replace(shard, out / SHARD.format(number))
        lock.release()
        shutil.rmtree(part)
    FeatureWriter(out, **made_by).close()  # opening a folder makes its index from its shards


def _collect_failures(out: Path, requested: set[str], done: set[str]) -> None:
    """One list of what failed: in this run, or in earlier ones among the videos not requested this time."""
    failed = {name: reason for name, reason in read_failed(out).items() if name not in requested and name not in done}
    for part in sorted(out.glob(PARTS)):
        failed |= read_failed(part)
    write_failed(out, failed)


__all__ = ["ExtractionReport", "extract_features"]
