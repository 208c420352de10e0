"""`longvlm extract`: videos are encoded once, for any number of trainings; and the check that they fit the model.

    report = extract_features(["videos"], "features", model=model, processor=processor)
    FeatureReader("features")["cooking/v_0"].local_features

Several processes (`accelerate launch -m longvlm extract ...`) each take a share and write it, shard by shard, into a
folder of their own inside `out`. Whole shards are then moved into `out`, whose index is made from the shards it holds:
so whatever is killed when, the next run goes on with the videos that no shard has.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from longvlm.conversion.parts import IMAGE_OPTIONS
from longvlm.features.store import FeatureReader, FeatureWriter, fingerprint
from longvlm.training.data import FAILED, VIDEO_SUFFIXES, read_failed

PART, SHARDS = ".part-{:05}", "features-*.safetensors"
METHOD = (
    "frames_per_segment",
    "tokens_per_segment",
    "vision_feature_layer",
    "merge_schedule",
    "merge_similarity",
    "merge_num_heads",
    "merge_order",
)
# What decides the pixels that the encoder gets.
PREPROCESSING = ("num_frames", "fps", "max_frames", "short_video", "shortest_edge", *IMAGE_OPTIONS)


@dataclass
class ExtractionReport:
    """How many videos were encoded now, were there before, and could not be read."""

    encoded: int = 0
    there_before: int = 0
    failed: int = 0

    def __str__(self) -> str:
        listed = f" (see {FAILED})" if self.failed else ""
        return f"{self.encoded:,} videos encoded, {self.there_before:,} there before, {self.failed:,} failed{listed}"


def find_videos(sources: Iterable[str | Path]) -> dict[str, Path]:
    """
    Videos by name.

    Args:
        sources: video files, folders of them (also in sub-folders), or `.txt` files with a path on each line.

    Returns:
        Paths in order of their names: a file in a folder is called by its path in there without the suffix
        (`cooking/v_0`), any other by its own name without the suffix.

    Raises:
        ValueError: a source does not exist, there are no videos, or two have one name.
    """
    found: dict[str, Path] = {}

    def add(name: str, file: Path) -> None:
        if found.setdefault(name, file) != file:
            raise ValueError(f'{found[name]} and {file} would both be called "{name}"; rename one of them')

    for source in map(Path, sources):
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
                    add(file.relative_to(source).with_suffix("").as_posix(), file)
        elif not source.is_file():
            raise ValueError(f"{source}: no such file or folder")
        elif source.suffix == ".txt":
            for line in source.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    add(Path(line.strip()).stem, Path(line.strip()))
        else:
            add(source.stem, source)
    if not found:
        raise ValueError(f"no videos in {', '.join(map(str, sources))}; looked for {', '.join(VIDEO_SUFFIXES)}")
    return dict(sorted(found.items()))


def feature_metadata(model, video_processor, video_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides the features of a video, as JSON values: encoder, preprocessing, merging.

    The encoder's weights are hashed as bfloat16, so that a checkpoint and its bfloat16 copy are the same.
    """
    config = model.config
    digest = hashlib.sha256()
    tower = model.base_model.vision_tower if hasattr(model.base_model, "vision_tower") else model.vision_tower
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    options = dict(video_options or {})
    if options.get("num_frames") is not None or options.get("fps") is not None:
        options = {"num_frames": None, "fps": None, **options}
    values = {name: options.get(name, getattr(video_processor, name, None)) for name in PREPROCESSING}
    if values["fps"] is not None:
        values["num_frames"] = None
    metadata = {
        "encoder": config.vision_config.model_type,
        "encoder_weights": digest.hexdigest()[:16],
        "frame_size": list(config.frame_size),
        **{name: getattr(config, name) for name in METHOD},
        **values,
    }
    return json.loads(json.dumps(metadata, default=_as_json))


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value):  # transformers' sizes; which fields they have differs between versions
        return {
            item.name: getattr(value, item.name) for item in fields(value) if getattr(value, item.name) is not None
        }
    return dict(value) if isinstance(value, Mapping) else int(value)


def check_features(reader: FeatureReader, metadata: Mapping[str, Any], num_global_layers: int) -> None:
    """
    Raises:
        ValueError: the features were not made as `metadata` (of `feature_metadata`) says.
    """
    if reader.fingerprint == fingerprint({**metadata, "num_global_layers": num_global_layers}):
        return
    wanted = {**metadata, "num_global_layers": num_global_layers}
    made = {**reader.metadata, "num_global_layers": reader.num_global_layers}
    names = [name for name in sorted({*wanted, *made}) if wanted.get(name) != made.get(name)]
    differences = ", ".join(f"{name} is {made.get(name)!r} and not {wanted.get(name)!r}" for name in names[:4])
    raise ValueError(
        f"the features in {reader.folder} do not fit the model: {differences}; extract them again with this model, "
        "give the num_frames, fps or max_frames that they were extracted with, or set check_features: false if you "
        "know better"
    )


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
    progress: bool = False,
) -> ExtractionReport:
    """
    Encodes videos into a folder of feature shards; to be called by every process.

    Args:
        sources: for `find_videos`; or a mapping from names to videos of any kind that the video processor takes.
        out: the folder, new or begun before: what it has is not encoded again.
        model, processor: a LongVLM, in eval mode, on the device to use.
        video_options: of the video processor (`num_frames`, `fps`, `max_frames`...).
        store_dtype: of the features; default: the one the encoder computes in.
        shard_bytes: a shard is written when so much is encoded; as much is lost at most when the process is killed.
        progress: show a bar, with rate and time left, of the first process's share.

    Returns:
        Counts over all processes. A video that cannot be read stands in `failed.jsonl` with the reason, and is tried
        again by the next run.

    Raises:
        ValueError: see `find_videos` and `FeatureWriter`.
    """
    # On a machine without accelerators, processes find each other only when told that the CPU is meant.
    state, out = PartialState(cpu=model.device.type == "cpu"), Path(out)
    videos = sources if isinstance(sources, Mapping) else find_videos(sources)
    metadata = feature_metadata(model, processor.video_processor, video_options)
    layers = model.config.num_global_layers
    report = ExtractionReport()
    if state.is_main_process:
        FeatureWriter(out, num_global_layers=layers, metadata=metadata).close()
        _adopt_parts(out, layers, metadata)
    state.wait_for_everyone()
    done = set(FeatureReader(out))
    todo = [name for name in videos if name not in done]
    report.there_before = len(videos) - len(todo)
    share = todo[state.process_index :: state.num_processes]
    part = out / PART.format(state.process_index)
    state.wait_for_everyone()
    with (
        FeatureWriter(part, num_global_layers=layers, metadata=metadata, shard_bytes=shard_bytes) as writer,
        open(part / FAILED, "w", encoding="utf-8") as failed,
        _bar(len(share), state, progress) as bar,
    ):
        for name in share:
            try:
                pieces = processor.video_processor.iter_pixel_values(videos[name], **dict(video_options or {}))
                features = model.encode_video(pieces)
                (local,), (memory,) = features.local_features, features.global_features
                local, memory = (t.to("cpu", store_dtype or t.dtype, copy=True) for t in (local, memory))
                writer.check(name, local, memory)
            except (ValueError, OSError) as error:
                reason = " ".join(str(error).split())
                failed.write(json.dumps({"video": name, "reason": reason}, ensure_ascii=False) + "\n")
                failed.flush()
            else:
                writer.add(name, local, memory)  # a disk that is full is no fault of this video
            bar.update()
    state.wait_for_everyone()
    if state.is_main_process:
        _write_failed(out, set(videos), set(done))
        _adopt_parts(out, layers, metadata)
    state.wait_for_everyone()
    there = set(FeatureReader(out))
    report.encoded = sum(name in there for name in todo)
    report.failed = len(todo) - report.encoded
    return report


def _bar(total: int, state, progress: bool) -> tqdm:
    several = f" (share of 1 of {state.num_processes} processes)" if state.num_processes > 1 else ""
    return tqdm(
        total=total,
        unit="video",
        desc=f"Encoding{several}",
        disable=not progress or not state.is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )


def _adopt_parts(out: Path, num_global_layers: int, metadata: Mapping[str, Any]) -> None:
    """Moves the whole shards of the processes' folders into `out`, and makes its index anew."""
    for part in sorted(out.glob(PART.format(0).replace("00000", "*"))):
        lock = FileLock(part / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{out} is being written to by another process") from None
        number = max((int(shard.stem.rsplit("-", 1)[1]) for shard in out.glob(SHARDS)), default=0)
        for shard in sorted(part.glob(SHARDS)):
            number += 1
            os.replace(shard, out / f"features-{number:05}.safetensors")
        lock.release()
        shutil.rmtree(part)
    # Opening a folder makes its index from its shards.
    FeatureWriter(out, num_global_layers=num_global_layers, metadata=metadata).close()


def _write_failed(out: Path, asked: set[str], done: set[str]) -> None:
    """One list of what failed: now, or earlier among videos that were not asked for this time."""
    lines = []
    before = read_failed(out).items()
    lines += [{"video": name, "reason": reason} for name, reason in before if name not in asked and name not in done]
    for file in sorted(out.glob(f"{PART.format(0).replace('00000', '*')}/{FAILED}")):
        lines += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not lines:
        (out / FAILED).unlink(missing_ok=True)
        return
    temporary = out / f"{FAILED}.partial"
    temporary.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines), encoding="utf-8")
    os.replace(temporary, out / FAILED)


__all__ = ["ExtractionReport", "check_features", "extract_features", "feature_metadata", "find_videos"]
