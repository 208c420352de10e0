"""Weights by name, mapped from the files that people keep them in, to be put into a model as they are.

(`shards.py` reads them one by one into memory of their own, for checkpoints that are written without a model.)
safetensors and zipped `.bin`/`.pt` files are mapped, not loaded: memory is taken by the tensors that are asked for.
Pickles are read with `weights_only=True`, which runs nothing that they hold. A TorchScript archive is code as well as
weights: it is read only if that is allowed.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

# As transformers looks for them.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors of some files, by name; a name in several files is the last one's.

    Args:
        files: `.safetensors`, or anything that `torch.save` has written: a state dict, or a dict that holds one as
            "state_dict".
        allow_torchscript: read TorchScript archives too. They can run code: only of a source that you trust.

    Raises:
        ValueError: a file is broken, or holds more than tensors.
    """

    def __init__(self, *files: str | Path, allow_torchscript: bool = False):
        self.files = tuple(Path(file) for file in files)
        self._sources: dict[str, Mapping] = {}
        for file in self.files:
            tensors = _open(file, allow_torchscript)
            self._sources |= dict.fromkeys(tensors, tensors)

    @classmethod
    def of_folder(cls, folder: str | Path) -> "WeightFiles":
        """The weights of a checkpoint folder, in one file or in shards."""
        folder = Path(folder)
        for name in FILE_NAMES:
            index = folder / f"{name}.index.json"
            if (folder / name).is_file():
                return cls(folder / name)
            if index.is_file():
                try:
                    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f'{index} is no index of shards: it has no "weight_map"') from None
                lacking = [shard for shard in shards if not (folder / shard).is_file()]
                if lacking:
                    raise ValueError(f"{folder} lacks {lacking[0]}, which its {index.name} names; download it again")
                return cls(*(folder / shard for shard in shards))
        raise ValueError(f"{folder} has no weights: {' or '.join(FILE_NAMES)}, whole or in shards with an index")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sources[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class _Safetensors(Mapping[str, torch.Tensor]):
    def __init__(self, file: Path):
        self._file = safe_open(file, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(file: Path, allow_torchscript: bool) -> Mapping[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        try:
            return _Safetensors(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); download it again") from None
    zipped = zipfile.is_zipfile(file)
    if zipped and is_torchscript(file):
        if not allow_torchscript:
            raise ValueError(
                f"{file} is a TorchScript archive, which can run code when it is read; take the weights as "
                "safetensors, or, if you trust its source, allow it with --allow-torchscript (allow_torchscript=True)"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the format is old, and so are the files
            return torch.jit.load(file, map_location="cpu").state_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols; what counts is said below
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} holds more than tensors, or is broken, and is not read: a pickle can run code; "
            "save its state dict alone, best as safetensors"
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{file} is not a whole file of weights ({reason})") from None
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    tensors = (
        {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        if isinstance(values, Mapping)
        else {}
    )
    if not tensors:
        raise ValueError(f"{file} holds no state dict, but a {type(values).__name__} without tensors")
    return tensors


def is_torchscript(file: Path) -> bool:
    """Whether a zip file is a TorchScript archive: weights and code."""
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())
