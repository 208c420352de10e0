"""Reads the released code's feature files, pickles of one numpy array each, without running any code in them.

Two layers of defence: before anything is loaded, the opcodes are compared with a short list of harmless ones; and the
names in a numpy pickle (of numpy 1 or 2) stand for inert objects, not for numpy's functions. What those objects
collect is then checked, size against shape, and the result can only be a float array.
"""

import io
import math
import pickle
import pickletools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longvlm.conversion.progress import Progress, silent
from longvlm.features.failures import FAILED, FailureLog, write_failed
from longvlm.features.store import FeatureWriter
from longvlm.files import check_regular

SEGMENTS = 10  # of the original's 100 frames


@dataclass(frozen=True)
class FeatureLayout:
    """How many tokens a segment is merged into, and the fields of `LongVLMConfig` that say so."""

    tokens_per_segment: int
    method: dict[str, Any]

    @property
    def local_rows(self) -> int:
        return SEGMENTS * self.tokens_per_segment


LAYOUTS = {
    "paper": FeatureLayout(30, {"tokens_per_segment": 30}),
    "released": FeatureLayout(20, {"merge_schedule": [2880, 1440, 720, 360, 180, 90, 40]}),
}


def layout_of_rows(rows: int) -> str | None:
    """The layout with this number of local features: 300 for the paper's, 200 for the released script's."""
    return next((name for name, layout in LAYOUTS.items() if layout.local_rows == rows), None)


def layout_of_file(file: str | Path) -> str:
    """
    The layout that a file of local features has.

    Raises:
        ValueError: it has the number of rows of neither, or cannot be read.
    """
    rows = len(read_feature_file(file))
    layout = layout_of_rows(rows)
    if layout is None:
        known = " or ".join(f"{layout.local_rows} ({name})" for name, layout in LAYOUTS.items())
        raise ValueError(f"{file} has {rows} rows, but local features have {known}")
    return layout


# --- a pickle of one float array, and nothing else ---

MAX_BYTES = 2**30
MAX_OPCODES = 200  # a numpy array's pickle has about 60
MAX_MEMO = 1000  # the memo is an array as long as the largest index
OPCODES = frozenset(
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD "
    "SHORT_BINUNICODE BINUNICODE UNICODE SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 "
    "SHORT_BINSTRING BINSTRING STRING "
    "BININT BININT1 BININT2 INT LONG LONG1 NONE NEWTRUE NEWFALSE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET".split()
)
FLOATS = ("f2", "f4", "f8")


def read_feature_file(file: str | Path) -> np.ndarray:
    """
    The array in a feature file: 2-D, float16, float32 or float64.

    Raises:
        ValueError: the file holds anything else, or more.
        OSError: it cannot be read.
    """
    file = Path(file)
    check_regular(file)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file} has {size} bytes; features of one video have at most {MAX_BYTES}")
    try:
        return load_float_array(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not read: {error}") from None


def load_float_array(data: bytes) -> np.ndarray:
    """The array in a pickle of one float matrix. Raises `ValueError` for all other bytes."""
    _check_opcodes(data)
    try:
        value = _NumpyUnpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # whatever a malformed pickle makes the unpickler and the inert objects raise
        raise ValueError(f"it is not a pickle of a numpy array ({type(error).__name__})") from None
    if type(value) is not _Array:
        raise ValueError("it is a pickle of something other than a numpy array")
    return value.to_numpy()


def _check_opcodes(data: bytes) -> None:
    end = 0
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data), start=1):
            if opcode.name not in OPCODES:
                raise ValueError(f"it is not a plain pickle of an array (it has the instruction {opcode.name})")
            if count > MAX_OPCODES:
                raise ValueError("it is not a plain pickle of an array (it has too many instructions)")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > MAX_MEMO:
                raise ValueError("it is not a plain pickle of an array (its memo is too large)")
            end = (position or 0) + 1
    except ValueError as error:
        if str(error).startswith("it is"):
            raise
        raise ValueError(f"it is not a pickle, or is cut short ({' '.join(str(error).split())[:100]})") from None
    except Exception as error:
        raise ValueError(f"it is not a pickle, or is cut short ({type(error).__name__})") from None
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the array")


class _NumpyUnpickler(pickle.Unpickler):
    """Knows the names in pickles of numpy arrays, and resolves them to inert objects."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="latin1")  # protocol 2 of Python 2: bytes are strings
        core = {"_reconstruct": _Call(_reconstruct), "_frombuffer": _Call(_frombuffer)}
        self._names = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _Call(_Dtype),
            ("_codecs", "encode"): _Call(_encode),
        }
        for package in ("numpy.core", "numpy._core"):
            self._names[f"{package}.multiarray", "_reconstruct"] = core["_reconstruct"]
            self._names[f"{package}.numeric", "_frombuffer"] = core["_frombuffer"]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise ValueError(f"it asks for {module}.{name}"[:120] + ", which no float array needs") from None


class _Inert:
    """An object that a pickle can neither change nor look into."""

    __slots__ = ()

    def __setstate__(self, state) -> None:
        raise ValueError("it is not a plain pickle of an array (it changes a name)")


class _Call(_Inert):
    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)


_NDARRAY = _Inert()


class _Dtype(_Inert):
    """Stands for a `numpy.dtype`: remembers the kind and the byte order."""

    __slots__ = ("kind", "order")

    def __init__(self, kind, align=False, copy=False):
        if kind not in FLOATS:
            raise ValueError(f"it holds values of type {str(kind)[:20]!r}, not floats")
        self.kind, self.order = kind, "<"

    def __setstate__(self, state) -> None:
        version, order, *rest = state
        if version != 3 or order not in ("<", ">") or rest[:3] != [None, None, None]:
            raise ValueError("its values are not plain floats")
        self.order = order


class _Array(_Inert):
    """Stands for an array: remembers shape, dtype and bytes."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __init__(self) -> None:
        self.shape: Any = None

    def __setstate__(self, state) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def to_numpy(self) -> np.ndarray:
        if self.shape is None or type(self.dtype) is not _Dtype:
            raise ValueError("it holds an array without values")
        if isinstance(self.data, str):  # a protocol before 3
            self.data = _encode(self.data, "latin1")
        shape = self.shape
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"its array has the shape {str(shape)[:60]}; expected a matrix")
        dtype = np.dtype(self.dtype.order + self.dtype.kind)
        if not isinstance(self.data, (bytes, bytearray)) or math.prod(shape) * dtype.itemsize != len(self.data):
            raise ValueError(f"its array does not hold as many values as its shape {str(shape)[:60]} says")
        array = np.frombuffer(bytes(self.data), dtype).reshape(shape, order="F" if self.fortran else "C")
        return np.array(array, dtype.newbyteorder("="), order="C")


def _reconstruct(kind, shape, typecode) -> _Array:
    if kind is not _NDARRAY:
        raise ValueError("it holds another kind of array")
    return _Array()


def _frombuffer(data, dtype, shape, order) -> _Array:
    array = _Array()
    array.shape, array.dtype, array.fortran, array.data = shape, dtype, order == "F", data
    return array


def _encode(text, encoding) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it is not a plain pickle of an array (it encodes something)")
    return text.encode("latin1")


# --- folders of them ---


@dataclass
class FeatureReport:
    """How many videos were converted, and which layout they fit."""

    converted: int = 0
    there_before: int = 0
    failed: int = 0
    layouts: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.converted} videos converted, {self.there_before} already there, {self.failed} failed"]
        for name, count in sorted(self.layouts.items()):
            rows = f"{LAYOUTS[name].local_rows} rows: layout {name}" if name in LAYOUTS else "another number of rows"
            lines.append(f"{count} with {rows}")
        if self.failed:
            lines.append(f"the reasons are in {FAILED}")
        return "\n".join(lines)


def convert_features(
    local: str | Path,
    memory: str | Path,
    out: str | Path,
    *,
    num_global_layers: int = 5,
    shard_bytes: int = 2**28,
    progress: Progress | None = None,
) -> FeatureReport:
    """
    Converts folders of the original's feature pickles to feature shards; see `FeatureReader`.

    Args:
        local: folder of local features, `<video>.pkl`, `(S*M, d)` each; sub-folders become part of the name.
        memory: folder of memory features with the same names, `(hidden states, d)` each.
        out: folder of shards. An interrupted run is resumed: videos that are there are not read again.
        num_global_layers: E: global features are the last E rows of the memory. All rows are kept.
        shard_bytes: maximum size of a shard.
        progress: called as `progress(stage, videos, total)`.

    Returns:
        Counts. A file that cannot be read does not stop the others: it is listed with the reason in `failed.jsonl`,
        and tried again by the next run.

    Raises:
        ValueError: a folder does not exist or contains no `.pkl`, or not a single file could be read.
    """
    progress = progress or silent
    local, memory = Path(local), Path(memory)
    for folder in (local, memory):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    files = {file.relative_to(local).with_suffix("").as_posix(): file for file in sorted(local.rglob("*.pkl"))}
    if not files:
        raise ValueError(f"{local} contains no .pkl files")
    report, reason = FeatureReport(), ""
    metadata = {"source": "released LongVLM code"}
    with (
        FeatureWriter(out, num_global_layers=num_global_layers, metadata=metadata, shard_bytes=shard_bytes) as writer,
        FailureLog(out) as failures,
    ):
        for done, (video, file) in enumerate(files.items()):
            progress("converting features", done, len(files))
            if video in writer:
                report.there_before += 1
                continue
            try:
                values = _as_tensor(read_feature_file(file))
                other = memory / f"{video}.pkl"
                if not other.is_file():
                    raise ValueError(f"{other} does not exist")
                writer.add(video, values, _as_tensor(read_feature_file(other)))
            except (ValueError, OSError) as error:
                report.failed += 1
                reason = " ".join(str(error).split())
                failures.add(video, reason)
                continue
            report.converted += 1
            report.layouts[layout_of_rows(len(values)) or "other"] += 1
        progress("converting features", len(files), len(files))
        total = len(writer)
    if report.failed == 0:
        write_failed(out, {})
    if total == 0:
        raise ValueError(f"not one of {len(files)} files could be read; the last one: {reason}")
    return report


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    # float32 loses nothing: the values were made by an encoder.
    with np.errstate(over="ignore"):  # values that are not finite are refused later
        return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)


# --- export to the original format ---


def dump_float_array(array: np.ndarray) -> bytes:
    """A pickle of the array that numpy 1 and numpy 2 read.

    numpy 2 calls its module numpy._core, which early numpy 1 does not know; both know the old name. In protocol 3
    names are lines of text, so the old one can be put in.
    """
    data = pickle.dumps(np.ascontiguousarray(array), protocol=3)
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
