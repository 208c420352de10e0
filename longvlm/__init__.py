"""LongVLM (ECCV 2024) for Hugging Face transformers: ask questions about long videos.

`import longvlm` makes transformers know the model: `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
`AutoModelForMultimodalLM`, `AutoProcessor`, `AutoVideoProcessor` and `pipeline("video-question-answering")`.
`longvlm.tiny_checkpoint()` is the folder of a small trained checkpoint that comes with the package.
The code itself lies in the packages `longvlm.modeling_longvlm`, `longvlm.processing` and `longvlm.conversion`.
"""

import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout this folder holds only the public face, and its sub-packages are its neighbours. Started from there,
# Python finds this folder before an installed wheel: let it find the neighbours as well.
_parent = _Path(__file__).resolve().parent.parent
if (_parent / "modeling_longvlm").is_dir() and (_parent / "pyproject.toml").is_file():
    __path__.append(str(_parent))

from longvlm.bundled import tiny_checkpoint  # noqa: E402  (needs neither torch nor transformers)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from longvlm.modeling_longvlm.configuration_longvlm import LongVLMConfig
    from longvlm.modeling_longvlm.modeling_longvlm import LongVLMForConditionalGeneration, LongVLMModel
    from longvlm.modeling_longvlm.pipeline_longvlm import VideoQuestionAnsweringPipeline
    from longvlm.modeling_longvlm.token_merging import merge_tokens
    from longvlm.processing.processing_longvlm import LongVLMProcessor
    from longvlm.processing.video_decoding import VideoDecodeError
    from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor

__all__ = [
    "LongVLMConfig",
    "LongVLMForConditionalGeneration",
    "LongVLMModel",
    "LongVLMProcessor",
    "LongVLMVideoProcessor",
    "VideoDecodeError",
    "VideoQuestionAnsweringPipeline",
    "merge_tokens",
    "tiny_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from longvlm import registration

        value = getattr(registration, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _started_as_command() -> bool:
    """Whether this process is `longvlm ...` or `python -m longvlm ...`."""
    if _sys.argv[:1] == ["-m"]:
        return ("-m", "longvlm") in zip(_sys.orig_argv, _sys.orig_argv[1:], strict=False)
    return bool(_sys.argv) and _Path(_sys.argv[0]).name in ("longvlm", "longvlm.exe")


# The registrations need torch and transformers, seconds that `longvlm --help` should not cost; the commands that
# need them import `longvlm.registration` themselves.
if not _started_as_command():
    from longvlm import registration as registration
