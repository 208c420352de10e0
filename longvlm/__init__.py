"""LongVLM (ECCV 2024) for Hugging Face transformers: ask questions about long videos.

`import longvlm` makes transformers know the model: `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
`AutoModelForMultimodalLM`, `AutoProcessor`, `AutoVideoProcessor` and `pipeline("video-question-answering")`.
`longvlm.tiny_checkpoint()` is the folder of a small trained checkpoint that comes with the package.
The code itself lies in the packages `longvlm.modeling_longvlm`, `longvlm.processing` and `longvlm.conversion`.
"""

from pathlib import Path as _Path

# In a checkout this folder holds only the public face, and its sub-packages are its neighbours. Started from there,
# Python finds this folder before an installed wheel: let it find the neighbours as well.
_parent = _Path(__file__).resolve().parent.parent
if (_parent / "modeling_longvlm").is_dir() and (_parent / "pyproject.toml").is_file():
    __path__.append(str(_parent))

# Importing registers, whoever imports; it takes the seconds of torch and transformers. The command line is a package
# of its own (`longvlm/cli/`, installed as `longvlm_cli`), so that `longvlm --help` need not wait for it.
from longvlm.bundled import tiny_checkpoint  # noqa: E402
from longvlm.loading import load  # noqa: E402
from longvlm.registration import (  # noqa: E402
    LongVLMConfig,
    LongVLMEngine,
    LongVLMForConditionalGeneration,
    LongVLMModel,
    LongVLMProcessor,
    LongVLMVideoProcessor,
    VideoDecodeError,
    VideoQuestionAnsweringPipeline,
    merge_tokens,
)

__version__ = "0.1.0"

__all__ = [
    "LongVLMConfig",
    "LongVLMEngine",
    "LongVLMForConditionalGeneration",
    "LongVLMModel",
    "LongVLMProcessor",
    "LongVLMVideoProcessor",
    "VideoDecodeError",
    "VideoQuestionAnsweringPipeline",
    "load",
    "merge_tokens",
    "tiny_checkpoint",
]
