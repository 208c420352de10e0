"""The configuration of LongVLM: every choice of the method, one documented field each.

The letters of the paper, used in all shape comments: T frames in a video, N patches in a frame, d width of the vision
encoder, K frames in a segment, S segments in a video, M tokens per merged segment, E global tokens, C merge heads.
"""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .plain_numbers import whole_number
from .remote_code import is_remote
from .token_merging import check_method, clip_schedule

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
        vision_config (`PreTrainedConfig` or `dict`, *optional*): the vision encoder: any that `AutoModel` knows and
            that turns an image into one token per patch (CLIP, SigLIP, DINOv2, ViT...). Default: CLIP ViT-L/14. If the
            configuration has a vision part (CLIP, SigLIP), that part is used.
        text_config (`PreTrainedConfig` or `dict`, *optional*): the LLM: any that `AutoModelForCausalLM` knows.
            Default: Llama 7B.
        frames_per_segment (`int`, defaults to 10): K. Longer segments give fewer tokens for the same video, and a
            coarser account of what happens when.
        tokens_per_segment (`int`, defaults to 30): M, what the K * N tokens of a segment are merged down to. A segment
            of M tokens or fewer is not merged. With `merge_schedule` it is set to what the schedule leaves.
        num_global_layers (`int`, defaults to 5): E. The [CLS] tokens of the last E hidden states, averaged over all
            frames, become the global tokens. 0: none.
        vision_feature_layer (`int`, defaults to -2): the hidden state whose patch tokens are merged.
        merge_schedule (`list[int]`, *optional*): pairs merged in each step. Default: halve, then merge the rest. The
            schedule of the released script is `[2880, 1440, 720, 360, 180, 90, 40]`, which leaves 20 tokens.
        merge_similarity (`str`, defaults to `"mean_head"`): `"mean_head"` (the released code: one cosine of the mean
            over C slices of the feature) or `"per_head"` (the paper's equation 1: the mean of C cosines).
        merge_num_heads (`int`, defaults to 16): C. The similarity sees features in this many equal slices
            (heads); must divide the encoder's width. Changes which tokens merge, not how many.
        merge_order (`str`, defaults to `"matching"`): order of a segment's tokens: `"matching"` (the released code) or
            `"time"` (by the mean time of their patches).
        global_placement (`str`, defaults to `"prefix"`): global tokens before (`"prefix"`) or after (`"suffix"`) the
            local ones, or `"none"`.
        projector_type (`str`, defaults to `"linear"`): `"linear"` (d -> LLM width) or `"mlp2x_gelu"` (LLaVA-1.5's).
        video_token_id, video_start_token_id, video_end_token_id (`int`, *optional*): ids of `<vid_patch>`,
            `<vid_start>` and `<vid_end>`. Default: the last three rows of the LLM's embeddings.
        vision_chunk_frames (`int`, defaults to 16): how many frames the encoder sees at a time. Limits memory, does
            not change results. May be changed on a loaded model.
        image_size (`int`, *optional*): side of the square frames in pixels, if it is not the encoder's own (DINOv2
            configurations say 518, which is 13,690 tokens per segment).
        lm_head_bias (`bool`, defaults to `False`): whether the LLM's output layer has a bias.
        video_delimiters (`bool`, defaults to `True`): whether `<vid_start>` and `<vid_end>` stand around a video's
            tokens.

    Raises:
        ValueError: a value is impossible; one line names the field, the value and the limit.
    """

    model_type = "longvlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (as transformers has it)
    # `Trainer.predict` would try to gather these over the batches; the key/value cache has two names.
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
        image_size: int | list[int] | tuple[int, int] | None = None,
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
            # Given this key, `pipeline()` insists on the folder's code, although the installed package has registered
            # the task. Saving the model writes the key again.
            kwargs.pop("custom_pipelines", None)
        # transformers looks for it here, but it is up to the LLM.
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        self.validate_method()
        super().__init__(**kwargs)

    def validate_method(self) -> None:
        """Refuses values that the method cannot work with (see `Raises` of the class), and brings
        `tokens_per_segment` in line with `merge_schedule`. Called again by the model, since fields can be changed."""
        layers = self.vision_config.num_hidden_layers
        names = ("video_token_id", "video_start_token_id", "video_end_token_id")
        limits = {
            "frames_per_segment": 1,
            "tokens_per_segment": 1,
            "vision_chunk_frames": 1,
            "merge_num_heads": 1,
            "num_global_layers": 0,
            "vision_feature_layer": -layers - 1,
            **dict.fromkeys(names, 0),
        }
        for name, limit in limits.items():
            setattr(self, name, whole_number(name, getattr(self, name), limit))
        ids = {name: getattr(self, name) for name in names}
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"the three video tokens need ids of their own, got {ids}")
        if self.num_global_layers > layers:
            raise ValueError(
                f"num_global_layers must be at most {layers}, the layers of the vision encoder, got "
                f"{self.num_global_layers}"
            )
        if self.vision_feature_layer > layers:
            raise ValueError(
                f"vision_feature_layer must be a hidden state of the vision encoder, from {-layers - 1} to {layers}, "
                f"got {self.vision_feature_layer}"
            )
        if not isinstance(self.merge_schedule, (list, type(None))):
            raise ValueError(f"merge_schedule must be a list with the pairs of each step, got {self.merge_schedule!r}")
        if self.merge_schedule is not None:
            self.merge_schedule = [whole_number("each step of merge_schedule", r, 1) for r in self.merge_schedule]
        width = self.vision_config.hidden_size
        check_method(width, self.merge_num_heads, self.merge_similarity, self.merge_order, prefix="merge_")
        _one_of("global_placement", self.global_placement, ("prefix", "suffix", "none"))
        _one_of("projector_type", self.projector_type, ("linear", "mlp2x_gelu"))
        if not isinstance(self.video_delimiters, bool):
            raise ValueError(f"video_delimiters must be True or False, got {self.video_delimiters!r}")
        if isinstance(self.image_size, (list, tuple)):
            self.image_size = [whole_number("image_size", edge, 1) for edge in self.image_size]
        elif self.image_size is not None:
            self.image_size = whole_number("image_size", self.image_size, 1)
        (height, width), (patch_height, patch_width) = self.frame_size, _pair(self.vision_config.patch_size)
        if height < patch_height or width < patch_width:
            raise ValueError(
                f"a frame must hold at least one patch of {patch_height} x {patch_width} pixels, but frames are "
                f"{height} x {width}: set a larger image_size"
            )
        if self.merge_schedule is not None:
            full = self.frames_per_segment * self.patches_per_frame
            self.tokens_per_segment = full - sum(clip_schedule(self.merge_schedule, full))

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that the vision encoder is given."""
        return _pair(self.vision_config.image_size if self.image_size is None else self.image_size)

    @property
    def patches_per_frame(self) -> int:
        """N."""
        (height, width), (patch_height, patch_width) = self.frame_size, _pair(self.vision_config.patch_size)
        return (height // patch_height) * (width // patch_width)

    @property
    def num_global_tokens(self) -> int:
        """How many global tokens a video gets: E, or 0 if `global_placement` is `"none"`."""
        return 0 if self.global_placement == "none" else self.num_global_layers

    def segment_length(self, num_frames: int) -> int:
        """K of a video with `num_frames` frames."""
        return self.frames_per_segment

    def num_video_tokens(self, num_frames: int) -> int:
        """How many tokens the LLM gets for a video of `num_frames` frames, `<vid_start>` and `<vid_end>` not counted.

        The last segment may be short; a segment gives `min(M, its patches)` tokens.

        Raises:
            ValueError: `num_frames` is less than 1.
        """
        num_frames = whole_number("num_frames", num_frames, 1)
        k = self.segment_length(num_frames)
        segments, rest = divmod(num_frames, k)
        frames = [k] * segments + [rest]
        return self.total_video_tokens(sum(min(self.tokens_per_segment, n * self.patches_per_frame) for n in frames))

    def total_video_tokens(self, num_local_tokens: int) -> int:
        """How many tokens the LLM gets for a video of `num_local_tokens` merged tokens: these and the global ones."""
        return num_local_tokens + self.num_global_tokens


def _vision_config(value) -> PreTrainedConfig:
    config = _sub_config("vision_config", value, "clip_vision_model", _DEFAULT_VISION_CONFIG)
    config = getattr(config, "vision_config", config)  # CLIP and SigLIP also have a text tower
    missing = [n for n in ("hidden_size", "num_hidden_layers", "image_size", "patch_size") if not hasattr(config, n)]
    if missing:
        raise ValueError(
            f"vision_config has model_type {config.model_type!r}, which has no {', '.join(missing)}: use an encoder "
            "that turns an image into one token per patch (CLIP, SigLIP, DINOv2, ViT)"
        )
    return config


def _text_config(value) -> PreTrainedConfig:
    config = _sub_config("text_config", value, "llama", {}).get_text_config(decoder=True)
    known, causal = config.model_type in CONFIG_MAPPING, config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if (known and not causal) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"text_config has model_type {config.model_type!r}, which is not a causal language model: use one such as "
            "Llama or Qwen"
        )
    return config


def _sub_config(name: str, value, default_type: str, default: dict) -> PreTrainedConfig:
    if value is None:
        value = default
    if isinstance(value, dict):
        value = dict(value)
        model_type = value.pop("model_type", default_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{name} has model_type {model_type!r}, which this version of transformers does not know")
        return CONFIG_MAPPING[model_type](**value)
    if not isinstance(value, PreTrainedConfig):
        raise ValueError(f"{name} must be a configuration or a dict, got {type(value).__name__}")
    return value


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


LongVLMConfig.register_for_auto_class("AutoConfig")

__all__ = ["LongVLMConfig"]
