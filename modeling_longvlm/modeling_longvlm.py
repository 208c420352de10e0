"""LongVLM: segments -> local tokens, averaged [CLS] tokens -> global tokens, projector, LLM (paper, section 3).

`LongVLMModel.get_video_features` is the method; the rest is what every vision-language model in transformers has.
Note: the vision tower sees a limited number of frames at a time, and of a video's patches only the M tokens of each
finished segment and the running sums of the global tokens are kept. So memory hardly grows with a video's length, and
the features of one video do not depend on its neighbours in the batch.

The key/value cache has no name here: it is `past_key_values` in transformers 5.17 and `cache` in 5.24. `**kwargs`
carries it.
Letters as in `configuration_longvlm.py`: T frames, N patches, d width, K, S, M, E.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_longvlm import LongVLMConfig
from .plain_numbers import plain_generation_config, plain_generation_options, whole_number
from .remote_code import code_named
from .token_merging import merge_tokens
from .video_state_longvlm import LongVLMVideoState
from .vision_tower_longvlm import frames_for, to_device_of, vision_encoder

logger = logging.get_logger(__name__)

_NOT_BOTH = "give pixel_values_videos or video_features, not both: the features replace the pixels"


@dataclass
class LongVLMVideoFeatures(BaseModelOutputWithPooling):
    """
    What `get_video_features` returns: the features of one or more videos, good for any number of questions. They may
    be on any device and in any dtype.

    Args:
        last_hidden_state (`Tensor` of shape `(videos, max n_i, d)`): each video's tokens in the order in which
            the LLM gets them, before the projector, padded with zeros.
        pooler_output (`tuple` of `Tensor` of shape `(n_i, LLM width)`): the same after the projector, video by video.
        local_features (`tuple` of `Tensor` of shape `(L_i, d)`): each video's merged tokens, segment after
            segment.
        global_features (`Tensor` of shape `(videos, E, d)`): [CLS] tokens of the last E hidden states, averaged
            over the video's frames.
        num_frames (`tuple` of `int`, *optional*): the number of frames of each video.
        duration (`tuple` of `float` or `None`, *optional*): length of each video in seconds, if known.
        frames_per_segment (`tuple` of `int`, *optional*): K of each video.
        segment_seconds (`tuple` of `Tensor` of shape `(S_i, 2)` or `None`, *optional*): times, in seconds, of the
            first and the last frame of each segment, if known.
        hidden_states, attentions (`tuple` of `Tensor`, on request): of the vision tower, layer by layer, for the
            frames of all videos one after another.
    """

    local_features: tuple[Tensor, ...] | None = None
    global_features: Tensor | None = None
    num_frames: tuple[int, ...] | None = None
    duration: tuple[float | None, ...] | None = None
    frames_per_segment: tuple[int, ...] | None = None
    segment_seconds: tuple[Tensor | None, ...] | None = None

    def select(self, videos: Iterable[int]) -> "LongVLMVideoFeatures":
        """The features of the videos with these numbers, in this order; a number may occur more than once."""
        videos = list(videos)
        return type(self)(
            pooler_output=self.pooler_output and tuple(self.pooler_output[i] for i in videos),
            local_features=tuple(self.local_features[i] for i in videos),
            global_features=self.global_features[videos],
            **{name: values and tuple(values[i] for i in videos) for name, values in video_facts(self).items()},
        )

    @classmethod
    def cat(cls, features: "Iterable[LongVLMVideoFeatures]") -> "LongVLMVideoFeatures":
        """The videos of several outputs in one, without what questions do not need."""
        features = list(features)
        facts: dict[str, tuple] = {}
        for name in _FACTS:
            values = [video_facts(one)[name] for one in features]
            known = [value or (None,) * len(one.local_features) for value, one in zip(values, features, strict=True)]
            facts[name] = sum(known, ()) if any(values) else None
        return cls(
            local_features=tuple(local for one in features for local in one.local_features),
            global_features=torch.cat([one.global_features.to(features[0].global_features) for one in features]),
            **facts,
        )

    def detach(self) -> "LongVLMVideoFeatures":
        """What questions need, outside the autograd graph: local and global features, and facts about the videos."""
        return type(self)(
            local_features=tuple(local.detach() for local in self.local_features),
            global_features=self.global_features.detach(),
            **video_facts(self),
        )

    def num_tokens(self, config: LongVLMConfig) -> list[int]:
        """How many tokens the LLM gets for each video."""
        return [config.total_video_tokens(len(local)) for local in self.local_features]

    @property
    def num_bytes(self) -> int:
        """Size of the local and global features in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.local_features, self.global_features))


_FACTS = ("num_frames", "duration", "frames_per_segment", "segment_seconds")


def video_facts(features: Mapping) -> dict[str, tuple | None]:
    """What features, or a mapping in their place, say about their videos."""
    return {name: features.get(name) for name in _FACTS}


@dataclass
class LongVLMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        video_features ([`LongVLMVideoFeatures`], *optional*): features of the videos, if any; `video_outputs` is
            another name for them, transformers' own.
    """

    video_features: LongVLMVideoFeatures | None = None
    video_outputs = property(lambda self: self.video_features)


@dataclass
class LongVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        video_features ([`LongVLMVideoFeatures`], *optional*): features of the videos, if any; `video_outputs` is
            another name for them, transformers' own.
    """

    video_features: LongVLMVideoFeatures | None = None
    video_outputs = property(lambda self: self.video_features)


class LongVLMMultiModalProjector(nn.Module):
    """`(..., d)` -> `(..., LLM width)`: one linear layer (the paper), or two with a GELU between (LLaVA-1.5)."""

    def __init__(self, config: LongVLMConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width) if config.projector_type == "mlp2x_gelu" else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.linear_1(hidden_states.to(self.linear_1.weight.dtype))
        return hidden_states if self.linear_2 is None else self.linear_2(nn.functional.gelu(hidden_states))


class LongVLMPreTrainedModel(PreTrainedModel):
    config_class = LongVLMConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values", "cache", "video_features"]  # noqa: RUF012

    def post_init(self):
        super().post_init()
        # CLIP's list also names parts of its text model; FSDP fails at a class that the model does not contain.
        contained = {type(module).__name__ for module in self.modules()}
        listed = getattr(self, "_no_split_modules", None) or ()
        self._no_split_modules = {name for name in listed if name in contained}

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers. The folder also gets the code, and config.json names it; see `remote_code.py`."""
        with code_named(self):
            super().save_pretrained(save_directory, **kwargs)

    def get_video_features(
        self, pixel_values_videos: Tensor, num_frames: Tensor | list[int] | None = None, **kwargs
    ) -> tuple | LongVLMVideoFeatures:
        """Encodes videos; see [`LongVLMModel.get_video_features`]."""
        return self.base_model.get_video_features(pixel_values_videos, num_frames=num_frames, **kwargs)

    def encode_video(self, pieces: Iterable[Tensor], num_frames: int | None = None) -> LongVLMVideoFeatures:
        """Encodes one video piece by piece; see [`LongVLMModel.encode_video`]."""
        return self.base_model.encode_video(pieces, num_frames)

    def start_video(self, frames_per_segment: int | None = None, **kwargs) -> LongVLMVideoState:
        """Starts a video that grows; see [`LongVLMModel.start_video`]."""
        return self.base_model.start_video(frames_per_segment, **kwargs)


class LongVLMModel(LongVLMPreTrainedModel):
    """Vision tower, token merging, projector and LLM, without language modelling head.

    Args:
        config ([`LongVLMConfig`]): the configuration.
    """

    def __init__(self, config: LongVLMConfig):
        super().__init__(config)
        config.validate_method()
        self.vision_tower = vision_encoder(config.vision_config).build(config.vision_config)
        self.multi_modal_projector = LongVLMMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        num_frames: Tensor | list[int] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple | LongVLMVideoFeatures:
        """
        Encodes videos: the paper's method, from pixels to what the LLM gets.

        Args:
            pixel_values_videos (`Tensor` of shape `(videos, max_frames, 3, H, W)`): normalised frames, on any device.
            num_frames (`Tensor` of shape `(videos,)` or list, *optional*): how many frames each video really has; the
                rest is padding and is ignored. Default: all.
            output_hidden_states, output_attentions (`bool`, *optional*): also return those of the vision tower for
                all frames, which are large. Default: as in the configuration.

        Returns:
            [`LongVLMVideoFeatures`], with `n_i = config.num_video_tokens(num_frames[i])` tokens for video i.

        Raises:
            ValueError: a shape or a number of frames is impossible.
        """
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                "pixel_values_videos must have shape (videos, frames, channels, height, width), got "
                f"{tuple(pixel_values_videos.shape)}"
            )
        videos, max_frames = pixel_values_videos.shape[:2]
        if not videos:
            raise ValueError("pixel_values_videos contains no video: leave it out for prompts without video")
        if num_frames is None:
            num_frames = [max_frames] * videos
        else:
            several = isinstance(num_frames, (list, tuple))
            given = num_frames if several else torch.as_tensor(num_frames).flatten().tolist()
            num_frames = [whole_number("num_frames", count) for count in given]
        if len(num_frames) != videos or not all(1 <= n <= max_frames for n in num_frames):
            raise ValueError(
                f"num_frames must be a number from 1 to {max_frames} for each of {videos} videos, got {num_frames}"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        encoded = []
        for video, frames in zip(pixel_values_videos, num_frames, strict=True):
            state = self.start_video(self.config.segment_length(frames))
            state.append(video[:frames])
            encoded.append((*state.tokens(), state.frames_per_segment))
        local_features, global_features, frames_per_segment = zip(*encoded, strict=True)
        features = self.project_features(
            local_features=local_features,
            global_features=torch.stack(global_features),
            num_frames=tuple(num_frames),
            frames_per_segment=frames_per_segment,
        )
        if output_hidden_states or output_attentions:
            frames = torch.cat([video[:n] for video, n in zip(pixel_values_videos, num_frames, strict=True)])
            for name, value in self._vision_outputs(frames, output_hidden_states, output_attentions).items():
                features[name] = value
        return features

    def start_video(self, frames_per_segment: int | None = None, **kwargs) -> LongVLMVideoState:
        """
        Starts a video that grows: append frames, read its features at any time.

        Args:
            frames_per_segment (`int`, *optional*): K; default: the configuration's.
            kwargs: of [`LongVLMVideoState`].

        Example:

        ```python
        >>> state = model.start_video()
        >>> state.append(pixel_values)  # (frames, 3, H, W)
        >>> features = state.features()
        ```
        """
        return LongVLMVideoState(self, frames_per_segment, **kwargs)

    @torch.no_grad()
    def encode_video(self, pieces: Iterable[Tensor], num_frames: int | None = None) -> LongVLMVideoFeatures:
        """
        The features of ONE video, given in pieces: constant memory for any number of frames, and no gradients.

        Args:
            pieces (iterable of `Tensor` of shape `(frames, 3, H, W)`): runs of neighbouring frames, in order of time;
                for example `video_processor.iter_pixel_values(video)`. Where they are cut makes no difference.
            num_frames (`int`, *optional*): number of all frames, if it is known; the length of segments may depend on
                it (`config.segment_length`).

        Returns:
            [`LongVLMVideoFeatures`] of one video, equal to those of `get_video_features` for all frames at once.

        Raises:
            ValueError: there is no frame.
        """
        state = self.start_video(None if num_frames is None else self.config.segment_length(num_frames))
        for piece in pieces:
            state.append(piece)
        return state.features()

    def _vision_outputs(self, frames: Tensor, hidden_states: bool, attentions: bool) -> dict[str, tuple[Tensor, ...]]:
        """Hidden states and attentions of the vision tower, layer by layer, for all frames `(T, 3, H, W)`."""
        options = {"output_hidden_states": hidden_states, "output_attentions": attentions, "return_dict": True}
        if "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters:
            options["interpolate_pos_encoding"] = self.config.image_size is not None
        chunks = [
            self.vision_tower(frames_for(self.vision_tower, chunk, self.config), **options)
            for chunk in frames.split(self.config.vision_chunk_frames)
        ]
        names = [name for name, want in (("hidden_states", hidden_states), ("attentions", attentions)) if want]
        return {n: tuple(map(torch.cat, zip(*(chunk[n] for chunk in chunks), strict=True))) for n in names}

    def merge_segments(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """`(S, K, N, d)` -> tokens `(S, M, d)`, and which of them each patch was merged into, `(S, K * N)` int64."""
        config = self.config
        patches = segments.flatten(1, 2)  # (S, K*N, d)
        return merge_tokens(
            patches,
            num_tokens=min(config.tokens_per_segment, patches.shape[1]),
            schedule=config.merge_schedule,
            num_heads=config.merge_num_heads,
            similarity=config.merge_similarity,
            order=config.merge_order,
            tokens_per_frame=segments.shape[2],
            return_assignment=True,
        )

    @torch.no_grad()
    def get_token_assignment(self, pixel_values: Tensor) -> Tensor:
        """
        Which local token each patch of a video was merged into, to see what the method does.

        Args:
            pixel_values (`Tensor` of shape `(T, 3, H, W)`): normalised frames of one video.

        Returns:
            `(T, N)` int64: indices into the video's `local_features`.
        """
        state = self.start_video(self.config.segment_length(len(pixel_values)), keep_assignment=True)
        state.append(pixel_values)
        return state.assignment()

    def check_video_features(self, features: Mapping) -> Mapping:
        """Returns `features`, if this model can use them.

        Raises:
            ValueError: they are not features of videos, or have the wrong width or number of global tokens.
        """
        if not isinstance(features, Mapping) or not {"local_features", "global_features"} <= features.keys():
            raise ValueError(
                "video_features must be what get_video_features returned, or a mapping with its local_features and "
                f"global_features, got {type(features).__name__}"
            )
        width = self.config.vision_config.hidden_size
        for tokens in [*features["local_features"], features["global_features"]]:
            if tokens.shape[-1] != width:
                raise ValueError(
                    f"video_features are {tokens.shape[-1]} wide, but this model's vision encoder gives {width}: use "
                    "features from the same encoder, before the projector"
                )
        given, needed = features["global_features"].shape[1], self.config.num_global_tokens
        if needed and given != needed:  # a model without global tokens ignores those it is given
            raise ValueError(
                f"video_features have {given} global tokens per video, but this model needs {needed}: encode the "
                f'videos with num_global_layers={needed} and global_placement="{self.config.global_placement}"'
            )
        return features

    def as_video_features(self, features: Mapping) -> LongVLMVideoFeatures:
        """Features of one video, as a mapping or as what `get_video_features` returned, for this model.

        Raises:
            ValueError: this model cannot use them, or they are those of several videos.
        """
        features = self.check_video_features(features)
        if len(features["local_features"]) != 1:
            raise ValueError(
                f"a video part takes the features of one video, got those of {len(features['local_features'])}: use "
                "features.select([i]) in a part per video"
            )
        global_features = features["global_features"]
        return LongVLMVideoFeatures(
            local_features=tuple(features["local_features"]),
            # Without those that this model ignores, they can be joined with its own.
            global_features=global_features if self.config.num_global_tokens else global_features[:, :0],
            **video_facts(features),
        )

    def project_features(self, local_features, global_features: Tensor, **facts) -> LongVLMVideoFeatures:
        """Puts global and local tokens in order and projects them. Done at each use, so the projector can be trained.

        Args:
            local_features (sequence of `Tensor` of shape `(L_i, d)`), global_features (`Tensor` `(videos, E, d)`):
                before the projector, on any device.
            facts: further fields of the [`LongVLMVideoFeatures`].
        """
        projector = self.multi_modal_projector
        local_features = tuple(to_device_of(projector, local) for local in local_features)
        global_features = to_device_of(projector, global_features)
        tokens = []
        for local, global_ in zip(local_features, global_features, strict=True):
            global_ = global_.to(local.dtype)
            placed = {"prefix": [global_, local], "suffix": [local, global_], "none": [local]}
            tokens.append(torch.cat(placed[self.config.global_placement]))  # (n_i, d)
        projected = self.multi_modal_projector(torch.cat(tokens)).split([len(t) for t in tokens])
        return LongVLMVideoFeatures(
            last_hidden_state=nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            pooler_output=projected,
            local_features=local_features,
            global_features=global_features,
            **facts,
        )

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`(batch, length)` bool: where `<vid_patch>` stands. Without ids: where its embedding stands."""
        if input_ids is not None:
            return input_ids == self.config.video_token_id
        token = torch.tensor(self.config.video_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        num_frames: Tensor | None = None,
        video_features: LongVLMVideoFeatures | Mapping | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> tuple | LongVLMModelOutputWithPast:
        """
        Args:
            input_ids (`Tensor` of shape `(batch, length)`): a video is `<vid_start>`, n times `<vid_patch>`,
                `<vid_end>`. Videos fill these placeholders in order, prompt after prompt.
            pixel_values_videos (`Tensor` of shape `(videos, max_frames, 3, H, W)`): frames, normalised.
            num_frames (`Tensor` of shape `(videos,)`, *optional*): how many frames each video really has.
            video_features ([`LongVLMVideoFeatures`] or a mapping with its `local_features` and `global_features`):
                what `get_video_features` returned, instead of pixels.
            attention_mask, position_ids, inputs_embeds, **kwargs: as in the LLM.

        Raises:
            ValueError: placeholders and video tokens differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values_videos is not None and video_features is not None:
            raise ValueError(_NOT_BOTH)
        if pixel_values_videos is not None:
            video_features = self.get_video_features(pixel_values_videos, num_frames=num_frames, return_dict=True)
        elif video_features is not None:
            features = self.check_video_features(video_features)
            video_features = self.project_features(
                features["local_features"], features["global_features"], **video_facts(features)
            )

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if video_features is not None:
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)
            videos_per_prompt(placeholders, [len(tokens) for tokens in video_features.pooler_output])
            tokens = torch.cat(video_features.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], tokens)

        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return _output(LongVLMModelOutputWithPast, outputs, video_features=video_features)


class LongVLMForConditionalGeneration(LongVLMPreTrainedModel, GenerationMixin):
    """LongVLM with language modelling head: answers questions about videos.

    Args:
        config ([`LongVLMConfig`]): the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: LongVLMConfig):
        super().__init__(config)
        self.model = LongVLMModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        # Not every LLM calls its embeddings `embed_tokens` (GPT-2: `wte`).
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()
        if config.tie_word_embeddings and f"model.{name}" not in self._tp_plan:
            self._tp_plan.pop("lm_head", None)  # one tensor: sharded over devices in both places or in none

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        num_frames: Tensor | None = None,
        video_features: LongVLMVideoFeatures | Mapping | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> tuple | LongVLMCausalLMOutputWithPast:
        """
        Args:
            labels (`Tensor` of shape `(batch, length)`, *optional*): token ids to predict, -100 for positions without
                loss; shifted here.
            logits_to_keep (`int` or `Tensor`, defaults to 0): last positions whose logits are computed; 0:
                all.

        The other arguments are those of [`LongVLMModel.forward`].

        Example:

        ```python
        >>> inputs = processor(text="USER: <video>\\nWhat happens? ASSISTANT:", videos="film.mp4", return_tensors="pt")
        >>> answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1]:]
        >>> processor.batch_decode(answer, skip_special_tokens=True)
        ```
        """
        if labels is not None and input_ids is not None and pixel_values_videos is None and video_features is None:
            # Otherwise a training step that lost its video would go unnoticed.
            videos_per_prompt(self.model.get_placeholder_mask(input_ids, None), [])
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            num_frames=num_frames,
            video_features=video_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return _output(LongVLMCausalLMOutputWithPast, outputs, loss=loss, logits=logits)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """`(..., LLM width)` -> `(..., vocabulary)`, with what some LLMs apply after their output layer."""
        text = self.config.text_config
        logits = self.lm_head(hidden_states)
        if getattr(text, "logit_scale", None) is not None:  # Cohere
            logits = logits * text.logit_scale
        if getattr(text, "logits_scaling", None) is not None:  # Granite divides by it, HyperCLOVAX multiplies
            multiplies = text.model_type.startswith("hyperclovax")
            logits = logits * text.logits_scaling if multiplies else logits / text.logits_scaling
        if getattr(text, "lm_head_multiplier", None) is not None:  # Falcon-H1
            logits = logits * text.lm_head_multiplier
        for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma 2; RecurrentGemma
            if (cap := getattr(text, name, None)) is not None:
                logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """As in transformers. Videos are encoded once, whatever the number of beams or returned sequences, and the
        three video tokens are never generated.

        Raises:
            ValueError: placeholders and video tokens differ in number, or an option is not the number that it must be.
        """
        kwargs, generation_config = plain_generation_options(kwargs), plain_generation_config(generation_config)
        pixel_values_videos = kwargs.pop("pixel_values_videos", None)
        num_frames = kwargs.pop("num_frames", None)
        features = kwargs.pop("video_features", None)
        if pixel_values_videos is not None:
            if features is not None:
                raise ValueError(_NOT_BOTH)
            features = self.get_video_features(pixel_values_videos, num_frames=num_frames, return_dict=True)
        input_ids = kwargs.get("input_ids", inputs)
        prompt = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if features is not None:
            if kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None)) is not None:
                raise ValueError("prefill_chunk_size cannot be used with videos: leave it out")
            features = self.model.check_video_features(features)
            # Only what the steps need: assisted decoding copies its arguments, and autograd graphs cannot be copied.
            kwargs["video_features"] = LongVLMVideoFeatures(
                local_features=tuple(features["local_features"]),
                global_features=features["global_features"],
                **video_facts(features),
            ).detach()
        elif input_ids is not None and not kwargs.keys() & {"past_key_values", "cache"}:
            videos_per_prompt(self.model.get_placeholder_mask(input_ids, None), [])
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if prompt is not None and limit is not None and prompt.shape[1] > limit:
            logger.warning(
                f"the prompt has {prompt.shape[1]} tokens, but the language model was made for {limit}: use fewer "
                "frames, or a model with more frames_per_segment or fewer tokens_per_segment"
            )

        config = self.config
        never = [config.video_token_id, config.video_start_token_id, config.video_end_token_id]
        processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        # The logits come to the prompt's device; the head may be on another, or offloaded.
        processors.append(
            SuppressTokensLogitsProcessor(never, device=self.device if prompt is None else prompt.device)
        )
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, is_first_iteration=False, past_key_values=None, cache=None, inputs_embeds=None, **kwargs
    ):
        # generate() accepts what this signature names: embeddings, and the cache of an earlier turn under the name
        # that either version has for it.
        named = {"past_key_values": past_key_values, "cache": cache, "inputs_embeds": inputs_embeds}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=is_first_iteration,
            **{name: value for name, value in named.items() if value is not None},
            **kwargs,
        )
        cache = cache if past_key_values is None else past_key_values
        if not is_first_iteration and kwargs.get("use_cache", True):
            features = None  # the cache holds the video
        elif cache is not None and cache.get_seq_length() and inputs_embeds is None:
            features = self._not_in_cache(model_inputs.get("video_features"), input_ids, model_inputs["input_ids"])
        else:
            return model_inputs
        model_inputs.pop("video_features", None)
        return model_inputs if features is None else {**model_inputs, "video_features": features}

    def _not_in_cache(self, features, input_ids: Tensor, new_ids: Tensor) -> LongVLMVideoFeatures | None:
        """The videos that the cache does not hold yet, given those of all turns or of the new turn alone."""
        placeholders = self.model.get_placeholder_mask(new_ids, None)
        if features is None or not placeholders.any():
            return None
        counts = self._token_counts(features)
        if sum(counts) == int(placeholders.sum()):
            return features
        first = 0
        new: list[int] = []
        of_all_turns = videos_per_prompt(self.model.get_placeholder_mask(input_ids, None), counts)
        for videos, needed in zip(of_all_turns, placeholders.sum(1).tolist(), strict=True):
            last = first + videos
            num_new = next((n for n in range(videos + 1) if sum(counts[last - n : last]) == needed), videos)
            new += range(last - num_new, last)
            first = last
        return features.select(new)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats each prompt's videos along with the prompt, for beams and several returned sequences."""
        features = model_kwargs.pop("video_features", None)
        if features is not None and expand_size > 1:
            has_ids = input_ids is not None and input_ids.shape[1] > 0
            embeddings = model_kwargs.get("inputs_embeds")
            placeholders = self.model.get_placeholder_mask(input_ids if has_ids else None, embeddings)
            first, repeated = 0, []
            for videos in videos_per_prompt(placeholders, self._token_counts(features)):
                repeated += list(range(first, first + videos)) * expand_size
                first += videos
            features = features.select(repeated)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            model_kwargs["video_features"] = features
        return input_ids, model_kwargs

    def _token_counts(self, features: Mapping) -> list[int]:
        return [self.config.total_video_tokens(len(local)) for local in features["local_features"]]


def videos_per_prompt(placeholders: Tensor, token_counts: list[int]) -> list[int]:
    """How many of the videos belong to each prompt.

    Args:
        placeholders: `(batch, length)` bool, where video tokens go.
        token_counts: tokens of each video, in order.

    Raises:
        ValueError: the videos do not fill the placeholders exactly, prompt by prompt.
    """
    numbers, video = [], 0
    for prompt, needed in enumerate(placeholders.sum(1).tolist()):
        first, filled = video, 0
        while filled < needed and video < len(token_counts):
            filled += token_counts[video]
            video += 1
        if filled != needed:
            counts = " + ".join(map(str, token_counts[first:video]))
            given = f"its videos give {counts} tokens" if counts else "there is no video for it"
            raise ValueError(
                f"prompt {prompt} has {needed} placeholders for video tokens, but {given}: have the processor make "
                "the prompt for these videos, with this model's frames and tokens per segment"
            )
        numbers.append(video - first)
    if video < len(token_counts):
        raise ValueError(
            f"{len(token_counts)} videos were given, but the prompts have placeholders for {video}: write <video> "
            "once for each video"
        )
    return numbers


def _output(cls: type, outputs: Mapping, **more):
    """The inner model's `outputs` as a `cls`, whatever the cache is called in this version of transformers."""
    names = cls.__dataclass_fields__.keys() - more.keys() - ({"last_hidden_state"} if "logits" in more else set())
    return cls(**{name: value for name, value in outputs.items() if name in names}, **more)


LongVLMModel.register_for_auto_class("AutoModel")
LongVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["LongVLMForConditionalGeneration", "LongVLMModel", "LongVLMPreTrainedModel", "LongVLMVideoFeatures"]
