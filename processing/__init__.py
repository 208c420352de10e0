"""From videos and text to the model's input: sources, decoding, frame sampling, token ids."""

from .processing_longvlm import LongVLMProcessor
from .video_decoding import (
    DecodedVideo,
    FrameMetadata,
    VideoDecodeError,
    decode_video,
    is_torchcodec_usable,
    iter_video,
    probe_video,
)
from .video_processing_longvlm import LongVLMVideoProcessor
from .video_sources import VideoDecodeWarning

__all__ = [
    "DecodedVideo",
    "FrameMetadata",
    "LongVLMProcessor",
    "LongVLMVideoProcessor",
    "VideoDecodeError",
    "VideoDecodeWarning",
    "decode_video",
    "is_torchcodec_usable",
    "iter_video",
    "probe_video",
]
