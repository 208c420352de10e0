"""One shard of features: a safetensors file that describes itself, with a checksum for each video.

Tensors: `<video>/local` `(L, d)`, `<video>/memory` `(E', d)` (the released code's name for the global features), and
`<video>/seconds` `(S, 2)` float64, where the times of the segments are known. The file's metadata has one JSON object:

    {"version": 2, "fingerprint": "...", "width": d, "videos": {name: entry}}

An entry has the lengths `local` and `memory`; what is known of `num_frames`, `duration`, `frames_per_segment` and
`window`; and `checksum`, a BLAKE2b of the tensors and of the rest of the entry. Shards of version 1 have no more than
the two lengths.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "longvlm-features", 2
AGAIN = "remove this file and run what made it again: only its videos are encoded"


def seal(video: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a video: `facts`, the lengths of its tensors, and the checksum of all that."""
    entry = {"local": len(tensors["local"]), "memory": len(tensors["memory"]), **facts}
    return {**entry, "checksum": _checksum(video, tensors, entry)}


def write_shard(
    file: Path, tensors: Mapping[str, Mapping[str, Tensor]], entries: Mapping[str, Mapping], fingerprint: str
) -> None:
    """Writes videos, at least one: name -> tensors, and name -> entry of `seal`."""
    width = next(iter(tensors.values()))["local"].shape[1]
    described = {"version": VERSION, "fingerprint": fingerprint, "width": width, "videos": entries}
    named = {f"{video}/{kind}": tensor for video, kinds in tensors.items() for kind, tensor in kinds.items()}
    save_file(named, file, metadata={"format": "pt", FORMAT: json.dumps(described)})


class Shard:
    """An open shard. A video is compared with its checksum when it is first read.

    Attributes:
        entries: name -> entry.
        width: d.
        fingerprint: of the folder that it was written for; `None` in version 1.

    Raises:
        ValueError: the file is damaged, or no shard of features.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._opened = safe_open(file, framework="pt")
            described = json.loads(self._opened.metadata()[FORMAT])
            self.entries: dict[str, dict[str, Any]] = dict(described["videos"])
            self.width: int = described["width"]
            self.fingerprint: str | None = described.get("fingerprint")
            version = int(described.get("version", 1))
            if not all(isinstance(entry["local"], int) and entry["memory"] >= 0 for entry in self.entries.values()):
                raise ValueError("an entry has no lengths")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged or not a shard of features ({error}); {AGAIN}") from None
        if version > VERSION:
            raise ValueError(f"{file} has version {version}; this longvlm reads up to {VERSION}; update it")
        self._checked: set[str] = set()

    def read(self, video: str, expected: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a video, by kind.

        Args:
            expected: its entry, as the folder's index has it.

        Raises:
            ValueError: they are not those that were written.
        """
        entry, names = self.entries.get(video), set(self._opened.keys())
        kinds = [kind for kind in ("local", "memory", "seconds") if f"{video}/{kind}" in names]
        if entry is None or entry != expected or not {"local", "memory"} <= {*kinds}:
            raise self._damaged(video, "index and shard do not agree")
        # Copies: a tensor that points into the file would keep all of it open.
        tensors = {kind: self._opened.get_tensor(f"{video}/{kind}").clone() for kind in kinds}
        if video not in self._checked:
            rest = {name: value for name, value in entry.items() if name != "checksum"}
            if "checksum" in entry and entry["checksum"] != _checksum(video, tensors, rest):
                raise self._damaged(video, "the checksum is another")
            self._checked.add(video)
        return tensors

    def _damaged(self, video: str, how: str) -> ValueError:
        return ValueError(f'{self.file}: the features of the video "{video}" are damaged ({how}); {AGAIN}')


def _checksum(video: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([video, dict(entry)], sort_keys=True).encode())
    for kind, tensor in sorted(tensors.items()):
        digest.update(f"{kind} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["FORMAT", "VERSION", "Shard", "seal", "write_shard"]
