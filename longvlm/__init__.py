"""LongVLM (ECCV 2024) for Hugging Face transformers: ask questions about long videos.

`import longvlm` makes transformers know the model: `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
`AutoModelForMultimodalLM`, `AutoProcessor`, `AutoVideoProcessor` and `pipeline("video-question-answering")`.
`longvlm.load()` gives an engine to ask; `longvlm.tiny_checkpoint()` is the folder of a small trained checkpoint that
comes with the package.

The code is in sub-packages: `modeling_longvlm` and `processing` (the model and its input), `features` (encoding videos
once), `conversion`, `training`, `evaluation` and `publishing`.
"""

from pathlib import Path as _Path

# In a checkout the sub-packages lie beside this folder, not in it. Python that is started there finds this folder
# before an installed wheel, so it must find the sub-packages as well.
_parent = _Path(__file__).resolve().parent.parent
if (_parent / "modeling_longvlm").is_dir() and (_parent / "pyproject.toml").is_file():
    __path__.append(str(_parent))

# Importing registers, whoever imports, and takes the seconds that torch and transformers take. So the command line is
# a package of its own (`longvlm/cli/`, installed as `longvlm_cli`): `longvlm --help` does not wait for them.
from longvlm.bundled import tiny_checkpoint  # noqa: E402
from longvlm.loading import load  # noqa: E402
from longvlm.processing import probe_video  # noqa: E402
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
    "probe_video",
    "tiny_checkpoint",
]
