"""Reads and writes weights tensor by tensor, so that memory holds one tensor, not a checkpoint.

`TensorReader` knows the files of a checkpoint, `.safetensors` or `.bin`, sharded or not. Files are mapped into memory;
only `.bin` files in the format before torch 1.6 cannot be, and are held whole, one at a time. Pickles are read with
`weights_only=True`. `TensorWriter` writes `.safetensors` shards whose tensors are announced beforehand, as the header
of such a file stands before its data.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

# Names in the headers of safetensors files (https://github.com/huggingface/safetensors, "Format").
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
REMAP_BYTES = 2**28  # pages of a mapped file stay in memory until it is mapped anew


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorReader:
    """The tensors of a checkpoint: a folder (sharded or not) or one file.

    Raises:
        ValueError: no weights there, a file of the index lacks, or a file holds something else than tensors.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self._file: Path | None = None
        self._tensors: Mapping[str, torch.Tensor] | None = None
        self._touched = 0
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for file in _weight_files(self.source):
            for name, info in self._infos_of(file):
                self.infos[name] = info
                self._files[name] = file
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        """Names, file by file, in the order in which they lie there."""
        return iter(self.infos)

    def get(self, name: str) -> torch.Tensor:
        """The tensor, a copy in memory."""
        file = self._files[name]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name).clone()
        if self._file != file or (self._touched > REMAP_BYTES and zipfile.is_zipfile(file)):
            self._open_bin(file)
        assert self._tensors is not None
        self._touched += self.infos[name].num_bytes
        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Lets go of the file that was read last."""
        self._tensors, self._file, self._touched = None, None, 0

    def _infos_of(self, file: Path) -> Iterator[tuple[str, TensorInfo]]:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.offset_keys():
                        part = opened.get_slice(name)
                        yield name, TensorInfo(tuple(part.get_shape()), _dtype_named(part.get_dtype(), file))
            except SafetensorError as error:
                raise ValueError(f"{file} is no safetensors file, or is cut short: {error}") from None
            return
        self._open_bin(file)
        assert self._tensors is not None
        for name, tensor in self._tensors.items():
            yield name, TensorInfo(tuple(tensor.shape), tensor.dtype)

    def _open_bin(self, file: Path) -> None:
        self.close()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of pickle protocols; what counts is said below
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError:
            raise ValueError(f"{file} holds more than tensors (or is damaged); such a file is not read") from None
        except (RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it ends too early"
            raise ValueError(f"{file} is no file of torch.save, or is cut short: {reason}") from None
        if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise ValueError(f"{file} is not a state dict: a dict of tensors, nothing else, is wanted")
        self._file, self._tensors, self._touched = file, tensors, 0


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"{source} does not exist")
    for name in SINGLE_FILES[:1] + INDEX_FILES[:1] + SINGLE_FILES[1:] + INDEX_FILES[1:]:
        file = source / name
        if not file.is_file():
            continue
        if name in SINGLE_FILES:
            return [file]
        try:
            names = dict.fromkeys(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{file} is no index of shards: a "weight_map" is wanted') from None
        lacking = [shard for shard in names if not (source / shard).is_file()]
        if lacking:
            raise ValueError(f"{source} lacks {lacking[0]}, one of the {len(names)} shards that {name} names")
        return [source / shard for shard in names]
    raise ValueError(
        f"{source} holds no weights: one of {', '.join(SINGLE_FILES)}, or their .index.json with its shards, is wanted"
    )


def _dtype_named(name: str, file: Path) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{file} holds tensors of type {name}; give weights that are not quantised")
    return DTYPES[name]


class TensorWriter:
    """Writes `model.safetensors`, or shards of it with their index, into a folder, one tensor at a time.

    Args:
        folder: has to exist.
        plan: every tensor that will be written, in this order.
        max_shard_bytes: a shard holds no more, unless a single tensor does.

    Use as a context manager; leaving it without having written every tensor is an error.
    """

    def __init__(self, folder: Path, plan: Mapping[str, TensorInfo], *, max_shard_bytes: int = 5 * 10**9):
        self.plan = dict(plan)
        shards: list[list[str]] = []
        size = max_shard_bytes
        for name, info in self.plan.items():
            if size + info.num_bytes > max_shard_bytes and (size or not shards):
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += info.num_bytes
        self.folder = folder
        self.weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            self.weight_map |= dict.fromkeys(names, file)
        self._waiting = iter(self.plan)
        self._file: BinaryIO | None = None
        self._file_name: str | None = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the tensor that comes next in the plan."""
        expected = next(self._waiting, None)
        info = TensorInfo(tuple(tensor.shape), tensor.dtype)
        if name != expected or info != self.plan[name]:
            raise RuntimeError(f"{name} {info} was written where the plan has {expected} {self.plan.get(name)}")
        if self.weight_map[name] != self._file_name:
            self._start(self.weight_map[name])
        assert self._file is not None
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def _start(self, file_name: str) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, file in self.weight_map.items():
            if file == file_name:
                info = self.plan[name]
                header[name] = {
                    "dtype": DTYPE_NAMES[info.dtype],
                    "shape": list(info.shape),
                    "data_offsets": [offset, offset + info.num_bytes],
                }
                offset += info.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file_name = file_name
        opened = open(self.folder / file_name, "wb")  # closed by the next shard, or by __exit__
        self._file = opened
        opened.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            return
        left = next(self._waiting, None)
        if left is not None:
            raise RuntimeError(f"{left} was announced, but not written")
        if len(set(self.weight_map.values())) > 1:
            total = sum(info.num_bytes for info in self.plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": self.weight_map}
            (self.folder / INDEX_FILES[0]).write_text(json.dumps(index, indent=2), encoding="utf-8")


def compare(found: Mapping[str, TensorInfo], expected: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """What of a checkpoint does not fit a model: names under "missing", "unexpected" and "reshaped"."""
    return {
        "missing": sorted(set(expected) - set(found)),
        "unexpected": sorted(set(found) - set(expected)),
        "reshaped": sorted(
            f"{name} {found[name].shape} instead of {tuple(expected[name].shape)}"
            for name in set(found) & set(expected)
            if found[name].shape != tuple(expected[name].shape)
        ),
    }


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few, for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
