"""The configuration of LongVLM: every choice of the method, one documented field each.

The letters of the paper, used in shape comments throughout: T frames of a video, N patches of a frame, d width of the
vision encoder, K frames of a segment, S segments of a video, M tokens of a segment, E global tokens, C merge heads.
"""

import operator

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .remote_code import is_remote
from .token_merging import clip_schedule

# CLIP ViT-L/14 at 224 px, the paper's encoder.
_DEFAULT_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


class LongVLMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LongVLMModel`] or [`LongVLMForConditionalGeneration`]. The defaults are the paper's.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*): the vision encoder, any that `AutoModel` knows and
            that turns an image into one token a patch (CLIP, SigLIP, DINOv2, ViT...). Default: CLIP ViT-L/14. Of a
            configuration with a vision part (CLIP, SigLIP) that part is taken.
        text_config (`PreTrainedConfig` or `dict`, *optional*): the LLM, any that `AutoModelForCausalLM` knows.
            Default: Llama 7B.
        frames_per_segment (`int`, defaults to 10): K. More frames in a segment: fewer tokens for the same video, and
            a coarser account of what happens when.
        tokens_per_segment (`int`, defaults to 30): M, what is left of a segment of K * N tokens. A segment with no
            more than M tokens is not merged. With `merge_schedule` it is set to what the schedule leaves.
        num_global_layers (`int`, defaults to 5): E, the number of last hidden states whose [CLS] tokens, averaged
            over all frames, become the global tokens. 0: none.
        vision_feature_layer (`int`, defaults to -2): the hidden state whose patch tokens are merged.
        merge_schedule (`list[int]`, *optional*): pairs merged in each step. Default: halve, then the rest. The
            schedule of the released script is `[2880, 1440, 720, 360, 180, 90, 40]`, which leaves 20 tokens.
        merge_similarity (`str`, defaults to `"mean_head"`): `"mean_head"` (the released code: one cosine of the mean
            over C slices of the feature) or `"per_head"` (the paper's equation 1: the mean of C cosines).
        merge_num_heads (`int`, defaults to 16): C.
        merge_order (`str`, defaults to `"matching"`): order of a segment's tokens: `"matching"` (the released code) or
            `"time"` (by the mean time of their patches).
        global_placement (`str`, defaults to `"prefix"`): global tokens before (`"prefix"`) or after (`"suffix"`) the
            local ones, or `"none"`.
        projector_type (`str`, defaults to `"linear"`): `"linear"` (d -> LLM width) or `"mlp2x_gelu"` (LLaVA-1.5's).
        video_token_id, video_start_token_id, video_end_token_id (`int`, *optional*): ids of `<vid_patch>`,
            `<vid_start>` and `<vid_end>`. Default: the last three rows of the LLM's embeddings.
        vision_chunk_frames (`int`, defaults to 16): frames that go through the encoder at a time. Bounds the memory;
            changes no result. May be changed on a loaded model.
        image_size (`int`, *optional*): side of the square frames in pixels, where it is not the encoder's own (DINOv2
            configurations say 518, which is 13,690 tokens a segment).
        lm_head_bias (`bool`, defaults to `False`): whether the LLM's output layer has a bias.

    Raises:
        ValueError: for impossible values, in one line that names the field, the value and the limit.
    """

    model_type = "longvlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (as transformers has it)
    # Both names of the key/value cache: `Trainer.predict` would try to gather it over the batches.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "video_features"]  # noqa: RUF012

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        frames_per_segment: int = 10,
        tokens_per_segment: int = 30,
        num_global_layers: int = 5,
        vision_feature_layer: int = -2,
        merge_schedule: list[int] | None = None,
        merge_similarity: str = "mean_head",
        merge_num_heads: int = 16,
        merge_order: str = "matching",
        global_placement: str = "prefix",
        projector_type: str = "linear",
        video_token_id: int | None = None,
        video_start_token_id: int | None = None,
        video_end_token_id: int | None = None,
        vision_chunk_frames: int = 16,
        image_size: int | None = None,
        lm_head_bias: bool = False,
        video_delimiters: bool = True,
        **kwargs,
    ):
        self.vision_config = _vision_config(vision_config)
        self.text_config = _text_config(text_config)
        self.frames_per_segment = frames_per_segment
        self.tokens_per_segment = tokens_per_segment
        self.num_global_layers = num_global_layers
        self.vision_feature_layer = vision_feature_layer
        self.merge_schedule = list(merge_schedule) if isinstance(merge_schedule, tuple) else merge_schedule
        self.merge_similarity = merge_similarity
        self.merge_num_heads = merge_num_heads
        self.merge_order = merge_order
        self.global_placement = global_placement
        self.projector_type = projector_type
        self.vision_chunk_frames = vision_chunk_frames
        self.image_size = image_size
        self.lm_head_bias = lm_head_bias
        self.video_delimiters = video_delimiters

        vocab_size = self.text_config.vocab_size
        self.video_token_id = vocab_size - 3 if video_token_id is None else video_token_id
        self.video_start_token_id = vocab_size - 2 if video_start_token_id is None else video_start_token_id
        self.video_end_token_id = vocab_size - 1 if video_end_token_id is None else video_end_token_id

        if not is_remote(type(self)):
            # With this key in the configuration `pipeline()` insists on the folder's code; the installed package has
            # registered the task itself. `save_pretrained` of the model writes the key again.
            kwargs.pop("custom_pipelines", None)
        # `generate()` and tying look for it here; it is the LLM's to decide.
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        self.validate_method()
        super().__init__(**kwargs)

    def validate_method(self) -> None:
        """Refuses values that the method cannot work with (see `Raises` of the class), and brings
        `tokens_per_segment` in line with `merge_schedule`. The model calls it again: options may have been changed."""
        layers = self.vision_config.num_hidden_layers
        width = self.vision_config.hidden_size
        check_at_least("frames_per_segment", self.frames_per_segment, 1)
        check_at_least("tokens_per_segment", self.tokens_per_segment, 1)
        check_at_least("vision_chunk_frames", self.vision_chunk_frames, 1)
        check_at_least("merge_num_heads", self.merge_num_heads, 1)
        check_at_least("num_global_layers", self.num_global_layers, 0)
        ids = {name: getattr(self, name) for name in ("video_token_id", "video_start_token_id", "video_end_token_id")}
        for name, value in ids.items():
            check_at_least(name, value, 0)
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"The three video tokens need ids of their own, got {ids}.")
        if self.num_global_layers > layers:
            raise ValueError(
                f"num_global_layers must be at most the {layers} layers of the vision encoder, got "
                f"{self.num_global_layers}."
            )
        check_at_least("vision_feature_layer", self.vision_feature_layer, -layers - 1)
        if self.vision_feature_layer > layers:
            raise ValueError(
                f"vision_feature_layer must be a hidden state of the vision encoder, {-layers - 1} to {layers}, got "
                f"{self.vision_feature_layer}."
            )
        if width % self.merge_num_heads:
            raise ValueError(
                f"merge_num_heads must divide the width {width} of the vision encoder, got {self.merge_num_heads}."
            )
        if not isinstance(self.merge_schedule, (list, type(None))):
            raise ValueError(f"merge_schedule must be a list of numbers of pairs, got {self.merge_schedule!r}.")
        for r in self.merge_schedule or ():
            check_at_least("every step of merge_schedule", r, 1)
        _one_of("merge_similarity", self.merge_similarity, ("mean_head", "per_head"))
        _one_of("merge_order", self.merge_order, ("matching", "time"))
        _one_of("global_placement", self.global_placement, ("prefix", "suffix", "none"))
        _one_of("projector_type", self.projector_type, ("linear", "mlp2x_gelu"))
        if not isinstance(self.video_delimiters, bool):
            raise ValueError(f"video_delimiters must be True or False, got {self.video_delimiters!r}.")
        if self.image_size is not None and not isinstance(self.image_size, (list, tuple)):
            check_at_least("image_size", self.image_size, 1)
        (height, width), (patch_height, patch_width) = self.frame_size, _pair(self.vision_config.patch_size)
        if height < patch_height or width < patch_width:
            raise ValueError(
                f"A frame must hold a patch at least: frames are {height} x {width} pixels, patches "
                f"{patch_height} x {patch_width}."
            )
        if self.merge_schedule is not None:
            full = self.frames_per_segment * self.patches_per_frame
            self.tokens_per_segment = full - sum(clip_schedule(self.merge_schedule, full))

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the frames that the vision encoder is given."""
        return _pair(self.vision_config.image_size if self.image_size is None else self.image_size)

    @property
    def patches_per_frame(self) -> int:
        """N."""
        (height, width), (patch_height, patch_width) = self.frame_size, _pair(self.vision_config.patch_size)
        return (height // patch_height) * (width // patch_width)

    @property
    def num_global_tokens(self) -> int:
        """Global tokens that really come out: E, or 0 if `global_placement` is `"none"`."""
        return 0 if self.global_placement == "none" else self.num_global_layers

    def segment_length(self, num_frames: int) -> int:
        """K for a video of `num_frames` frames."""
        return self.frames_per_segment

    def num_video_tokens(self, num_frames: int) -> int:
        """Tokens that a video of `num_frames` frames gives the LLM, `<vid_start>` and `<vid_end>` not counted.

        The last segment may be short; a segment gives `min(M, its patches)` tokens.

        Raises:
            ValueError: if there is not a single frame.
        """
        check_at_least("num_frames", num_frames, 1)
        num_frames = operator.index(num_frames)
        k = self.segment_length(num_frames)
        segments, rest = divmod(num_frames, k)
        frames = [k] * segments + [rest]
        return self.total_video_tokens(sum(min(self.tokens_per_segment, n * self.patches_per_frame) for n in frames))

    def total_video_tokens(self, num_local_tokens: int) -> int:
        """Tokens that a video of `num_local_tokens` merged tokens gives the LLM: the global ones come to them."""
        return num_local_tokens + self.num_global_tokens


def _vision_config(value) -> PreTrainedConfig:
    config = _sub_config("vision_config", value, "clip_vision_model", _DEFAULT_VISION_CONFIG)
    config = getattr(config, "vision_config", config)  # of CLIP or SigLIP with both towers
    missing = [n for n in ("hidden_size", "num_hidden_layers", "image_size", "patch_size") if not hasattr(config, n)]
    if missing:
        raise ValueError(
            f"vision_config has model_type {config.model_type!r}, which has no {', '.join(missing)}: the vision "
            "encoder must turn square pictures into one token a patch (CLIP, SigLIP, DINOv2, ViT)."
        )
    return config


def _text_config(value) -> PreTrainedConfig:
    config = _sub_config("text_config", value, "llama", {}).get_text_config(decoder=True)
    known, causal = config.model_type in CONFIG_MAPPING, config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if (known and not causal) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"text_config has model_type {config.model_type!r}, no causal language model such as Llama or Qwen."
        )
    return config


def _sub_config(name: str, value, default_type: str, default: dict) -> PreTrainedConfig:
    if value is None:
        value = default
    if isinstance(value, dict):
        value = dict(value)
        model_type = value.pop("model_type", default_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name} has model_type {model_type!r}, which this version of transformers does not know."
            )
        return CONFIG_MAPPING[model_type](**value)
    if not isinstance(value, PreTrainedConfig):
        raise ValueError(f"{name} must be a configuration or a dict, got {type(value).__name__}.")
    return value


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_at_least(name: str, value, limit: int) -> None:
    if not hasattr(value, "__index__") or isinstance(value, bool) or operator.index(value) < limit:
        raise ValueError(f"{name} must be a whole number of at least {limit}, got {value!r}.")


def _one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


LongVLMConfig.register_for_auto_class("AutoConfig")

__all__ = ["LongVLMConfig"]
