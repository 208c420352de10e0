"""Features of many videos: extracted once, stored in shards, read in any order.

from longvlm.features import FeatureReader, extract_features
"""

from importlib import import_module
from typing import Any

_FILES = {
    "extract": ("ExtractionReport", "extract_features"),
    "failures": ("read_failed",),
    "fingerprint": ("check_features", "feature_metadata"),
    "store": ("FeatureReader", "FeatureWriter", "StoredFeatures"),
    "videos": ("VIDEO_SUFFIXES", "find_videos"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
