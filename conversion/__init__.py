"""Makes LongVLM checkpoints of parts and of other projects' checkpoints, and exports to the original format.

Each function is imported when it is first used: `from longvlm.conversion import convert_llava`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvlm.conversion.assemble import assemble
    from longvlm.conversion.llava import convert_llava
    from longvlm.conversion.openclip_vision import convert_open_clip
    from longvlm.conversion.original import ConversionReport, convert_original
    from longvlm.conversion.original_features import FeatureReport, convert_features, read_feature_file
    from longvlm.conversion.to_original import convert_to_original
    from longvlm.conversion.weights import Weights, WeightsWriter

_MODULES = {
    "ConversionReport": "original",
    "FeatureReport": "original_features",
    "Weights": "weights",
    "WeightsWriter": "weights",
    "assemble": "assemble",
    "convert_features": "original_features",
    "convert_llava": "llava",
    "convert_open_clip": "openclip_vision",
    "convert_original": "original",
    "convert_to_original": "to_original",
    "read_feature_file": "original_features",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # An import binds each module here under its name. `assemble` has to stay the function.
        if not (name == "assemble" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ConversionReport",
    "FeatureReport",
    "Weights",
    "WeightsWriter",
    "assemble",
    "convert_features",
    "convert_llava",
    "convert_open_clip",
    "convert_original",
    "convert_to_original",
    "read_feature_file",
]
