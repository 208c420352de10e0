"""Makes the Auto classes and `pipeline()` of transformers know "longvlm".

What saved folders need to load without this package is in `modeling_longvlm/remote_code.py`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from longvlm.modeling_longvlm.configuration_longvlm import LongVLMConfig
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMForConditionalGeneration, LongVLMModel
from longvlm.modeling_longvlm.pipeline_longvlm import VideoQuestionAnsweringPipeline
from longvlm.modeling_longvlm.remote_code import CONFIG_ENTRIES, PIPELINE_TASK
from longvlm.modeling_longvlm.token_merging import merge_tokens
from longvlm.processing.processing_longvlm import LongVLMProcessor
from longvlm.processing.video_decoding import VideoDecodeError
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor

__all__ = [
    "LongVLMConfig",
    "LongVLMEngine",
    "LongVLMForConditionalGeneration",
    "LongVLMModel",
    "LongVLMProcessor",
    "LongVLMVideoProcessor",
    "VideoDecodeError",
    "VideoQuestionAnsweringPipeline",
    "merge_tokens",
]

# exist_ok: reloading the module (notebooks) must not fail.
AutoConfig.register("longvlm", LongVLMConfig, exist_ok=True)
AutoModel.register(LongVLMConfig, LongVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(LongVLMConfig, LongVLMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LongVLMConfig, LongVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LongVLMConfig, LongVLMProcessor, exist_ok=True)
AutoVideoProcessor.register(LongVLMConfig, LongVLMVideoProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    PIPELINE_TASK,
    pipeline_class=VideoQuestionAnsweringPipeline,
    pt_model=AutoModelForImageTextToText,
    type=CONFIG_ENTRIES["custom_pipelines"][PIPELINE_TASK]["type"],
)
