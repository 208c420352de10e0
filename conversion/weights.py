"""The weights of checkpoints: `Weights` reads them by name, `WeightsWriter` writes them, one tensor at a time.

Memory holds the tensors that are in use, not the checkpoint: files are mapped, and nothing is read before it is asked
for. Pickles are read with `weights_only=True`, which runs nothing that they contain.
"""

import json
import pickle
import warnings
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longvlm.files import read_json_object

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
# In the order in which transformers looks for them; each whole, or in shards with an index.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
REMAP_BYTES = 2**24  # that may stay in memory after their tensors are gone


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# --- reading ---


class Weights(Mapping[str, Tensor]):
    """
    The tensors of a checkpoint by name, each read when it is used; `infos` has their shapes and dtypes.

    A tensor is mapped from its file: it takes no memory before it is used, and stays valid as long as it is held.
    What is written into it never reaches the file. Only files that cannot be mapped are held in memory, one at a time:
    `.bin` files older than torch 1.6, and TorchScript archives.

    Args:
        source: a folder with `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index; or one
            file: safetensors, or what `torch.save` wrote, a state dict or a dict with one as "state_dict".
        allow_torchscript: read TorchScript archives too. They can run code: only for a source that you trust.

    Raises:
        ValueError: there are no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """

    def __init__(self, source: str | Path, *, allow_torchscript: bool = False):
        self.source = Path(source)
        self.infos: dict[str, TensorInfo] = {}
        self._allow_torchscript = allow_torchscript
        self._files: dict[str, Path] = {}
        # The file that was read last.
        self._file: Path | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self._is_mapped = False
        self._num_bytes = 0
        self._given: list[weakref.ref[Tensor]] = []
        for file in _weight_files(self.source):
            self._open(file)
            for name in self._tensors:
                self.infos[name] = self._info(name)
                self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if self._file != file or self._is_worth_remapping():
            self._open(file)
        tensor = self._tensors[name].detach()  # an object of its own: `_tensors` holds the others
        self._num_bytes += self.infos[name].num_bytes
        self._given.append(weakref.ref(tensor))
        return tensor

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        """Names, file by file, in the order in which the tensors lie there."""
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def _info(self, name: str) -> TensorInfo:
        if isinstance(self._tensors, _SafetensorsFile):
            return self._tensors.info(name)
        return TensorInfo.of(self._tensors[name])

    def _is_worth_remapping(self) -> bool:
        """Pages that were read stay in memory until the file is mapped again, which frees them if nothing is held."""
        return self._is_mapped and self._num_bytes > REMAP_BYTES and all(tensor() is None for tensor in self._given)

    def _open(self, file: Path) -> None:
        self._file, self._tensors, self._num_bytes, self._given = None, {}, 0, []  # frees the last file first
        if file.suffix == ".safetensors":
            self._tensors, self._is_mapped = _SafetensorsFile(file), True
        else:
            zipped = zipfile.is_zipfile(file)
            is_torchscript = zipped and _is_torchscript(file)
            self._is_mapped = zipped and not is_torchscript
            self._tensors = (
                _read_torchscript(file, self._allow_torchscript) if is_torchscript else _read_pickle(file, mmap=zipped)
            )
        self._file = file


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"{source} does not exist")
    for name in FILE_NAMES:
        file, index = source / name, source / f"{name}{INDEX}"
        if file.is_file():
            return [file]
        if not index.is_file():
            continue
        try:
            names = read_json_object(index).get("weight_map")
        except ValueError as error:
            raise ValueError(f"{index.name} is not an index of shards: {error}") from None
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise ValueError(f'{index} is not an index of shards: it has no "weight_map"')
        shards = list(dict.fromkeys(names.values()))
        for shard in shards:
            if shard in ("", ".", "..") or Path(shard).name != shard:
                raise ValueError(f"{index} names the shard {shard!r:.200}, which is not a file beside it")
        missing = [shard for shard in shards if not (source / shard).is_file()]
        if missing:
            raise ValueError(
                f"{source} is missing {missing[0]}, one of the {len(shards)} shards named in {index.name}; "
                "download it again"
            )
        return [source / shard for shard in shards]
    raise ValueError(
        f"{source} contains no weights: {' or '.join(FILE_NAMES)}, in one file or in shards with an index"
    )


class _SafetensorsFile(Mapping[str, Tensor]):
    def __init__(self, file: Path):
        try:
            self._opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a safetensors file, or is cut short ({error}); download it again"
            ) from None
        self._file = file
        self._names = list(self._opened.offset_keys())

    def info(self, name: str) -> TensorInfo:
        part = self._opened.get_slice(name)
        dtype = DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{self._file} holds tensors of type {part.get_dtype()}; give weights that are not quantised"
            )
        return TensorInfo(tuple(part.get_shape()), dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self._opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_pickle(file: Path, *, mmap: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what matters is said below
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} holds more than tensors, or is damaged, and is not read: a pickle can run code; "
            "save its state dict alone, ideally as safetensors"
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{file} is not a file of weights, or is cut short ({reason}); download it again") from None
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    items = values.items() if isinstance(values, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file} contains no state dict, but a {type(values).__name__} without tensors")
    return tensors


def _is_torchscript(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(file: Path, allowed: bool) -> Mapping[str, Tensor]:
    if not allowed:
        raise ValueError(
            f"{file} is a TorchScript archive, which can run code when it is read; give the weights as safetensors, "
            "or, if you trust their source, use `allow_torchscript` of convert_open_clip"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the format is old, and so are the files
        return torch.jit.load(file, map_location="cpu").state_dict()


# --- writing ---


class WeightsWriter:
    """
    Writes `model.safetensors`, or shards of it with their index, into a folder, one tensor at a time.

    The header of a safetensors file comes before its data, so every tensor has to be announced first.

    Args:
        folder: has to exist.
        plan: every tensor that will be written, in this order.
        max_shard_bytes: maximum size of a shard, unless a single tensor is larger.

    Use it as a context manager; leaving it before every tensor is written is an error.
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
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else FILE_NAMES[0]
            self.weight_map |= dict.fromkeys(names, file)
        self._waiting = iter(self.plan)
        self._file: BinaryIO | None = None
        self._file_name: str | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor of the plan."""
        expected = next(self._waiting, None)
        info = TensorInfo.of(tensor)
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

    def __enter__(self) -> "WeightsWriter":
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
            (self.folder / f"{FILE_NAMES[0]}{INDEX}").write_text(json.dumps(index, indent=2), encoding="utf-8")
