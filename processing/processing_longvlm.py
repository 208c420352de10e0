"""From texts and videos to the model's input: `LongVLMProcessor`.

A prompt contains ONE `<vid_patch>` per video. The processor repeats it, once for each token that the model puts in its
place: `<vid_start>`, n x `<vid_patch>`, `<vid_end>`. It computes n from the number of frames and four numbers of the
method (paper section 3) that a checkpoint stores for the processor as well as for the model.
Note: user text (the content of a chat) is never searched for special tokens; see `text_escaping`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_messages import is_message, plain_messages
from .chat_template_form import AS_GIVEN, PARTS, STRING, content_form
from .chat_templates_longvlm import CHAT_TEMPLATES, DEFAULT_CHAT_TEMPLATE
from .option_values import plain_video_options, whole_number
from .text_escaping import ESCAPE_MARK, escape, tokenizer_for_escaped_text
from .video_processing_longvlm import SAMPLING, LongVLMVideoProcessor, auto_map_in_files_only, flatten_videos

logger = logging.get_logger(__name__)

# In the order in which the released code adds them, so that the ids are the same.
VIDEO_TOKEN, VIDEO_START_TOKEN, VIDEO_END_TOKEN = VIDEO_TOKENS = ("<vid_patch>", "<vid_start>", "<vid_end>")
VIDEO_ALIAS = "<video>"  # how the released code's data files mark a video


class VideoPart(NamedTuple):
    """A video of a conversation (`None`: a part without one), and its options."""

    video: Any
    options: dict[str, Any]


class LongVLMProcessor(ProcessorMixin):
    r"""
    Turns texts and videos into `input_ids`, `attention_mask`, `pixel_values_videos` and `num_frames`.

    The three video tokens are added to the tokenizer if they are missing (the caller resizes the model's embeddings),
    a missing pad token becomes the unknown or else the end token, and padding is on the left, as generation needs it.

    Args:
        video_processor (`LongVLMVideoProcessor`, *optional*): default: one with its default settings.
        tokenizer: any transformers tokenizer.
        chat_template (`str`, *optional*):
            A Jinja template or the name of a built-in one: `"vicuna_v1_1"` (the original's training prompt) or
            `"long_vlm_v1"` (its evaluation prompt). Default: the tokenizer's own, else `"vicuna_v1_1"`.
        frames_per_segment (`int`): number of frames per segment (K).
        tokens_per_segment (`int`): tokens per segment after merging (M); a segment with fewer patches keeps them all.
        num_global_tokens (`int`): number of global tokens per video (E); 0 if the model uses none.
        patches_per_frame (`int`): number of patches per frame (N).
        video_delimiters (`bool`): whether a video's tokens are enclosed in `<vid_start>` and `<vid_end>`.
    """

    def __init__(
        self,
        video_processor=None,
        tokenizer=None,
        chat_template=None,
        frames_per_segment=10,
        tokens_per_segment=30,
        num_global_tokens=5,
        patches_per_frame=256,
        video_delimiters=True,
    ):
        if tokenizer is None:
            raise ValueError("LongVLMProcessor needs a tokenizer, e.g. AutoTokenizer.from_pretrained(...)")
        counts = {
            "frames_per_segment": (frames_per_segment, 1),
            "tokens_per_segment": (tokens_per_segment, 1),
            "num_global_tokens": (num_global_tokens, 0),
            "patches_per_frame": (patches_per_frame, 1),
        }
        for name, (value, least) in counts.items():
            setattr(self, name, whole_number(name, value, least))
        if not isinstance(video_delimiters, bool):
            raise ValueError(f"video_delimiters={video_delimiters!r} must be True or False")
        self.video_delimiters = video_delimiters
        _prepare_tokenizer(tokenizer)
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None) or DEFAULT_CHAT_TEMPLATE
        if isinstance(chat_template, str):
            chat_template = _template_text(chat_template)
        if video_processor is None:
            video_processor = LongVLMVideoProcessor()
        self.video_token, self.video_start_token, self.video_end_token = VIDEO_TOKENS
        super().__init__(video_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(cls, config, tokenizer, video_processor=None, **kwargs) -> "LongVLMProcessor":
        """
        The processor that fits a model: it takes the numbers of the method from the model's configuration.

        Args:
            config: the model's `LongVLMConfig`.
            tokenizer: the LLM's.
            video_processor (`LongVLMVideoProcessor`, *optional*): default: one whose frames have the model's size.
            kwargs: further arguments of the class, such as `chat_template`.
        """
        if video_processor is None:
            height, width = config.frame_size
            video_processor = LongVLMVideoProcessor(size={"height": height, "width": width})
        return cls(
            video_processor=video_processor,
            tokenizer=tokenizer,
            frames_per_segment=config.frames_per_segment,
            tokens_per_segment=config.tokens_per_segment,
            num_global_tokens=config.num_global_tokens,
            patches_per_frame=config.patches_per_frame,
            video_delimiters=getattr(config, "video_delimiters", True),
            **kwargs,
        )

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers."""
        with auto_map_in_files_only(self, self.video_processor):
            return super().save_pretrained(save_directory, **kwargs)

    @property
    def video_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.video_token)

    @property
    def video_start_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.video_start_token)

    @property
    def video_end_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.video_end_token)

    # --- how many tokens ---

    # The rule is the model's (`LongVLMConfig`). It is repeated here because a processor is used without the model; all
    # other code asks one of the two.

    def segment_length(self, num_frames: int) -> int:
        """K for a video of `num_frames` frames."""
        return self.frames_per_segment

    def num_video_tokens(self, num_frames: int) -> int:
        """Number of tokens of a video of `num_frames` frames, without `<vid_start>` and `<vid_end>`."""
        num_frames = whole_number("num_frames", num_frames, 1)
        k = self.segment_length(num_frames)
        full, rest = divmod(num_frames, k)
        segments = [k] * full + [rest] * (rest > 0)
        return self.total_video_tokens(
            sum(min(self.tokens_per_segment, frames * self.patches_per_frame) for frames in segments)
        )

    def total_video_tokens(self, num_local_tokens: int) -> int:
        """Number of tokens of a video with `num_local_tokens` merged tokens: the global ones are added."""
        return num_local_tokens + self.num_global_tokens

    def count_video_tokens(self, video_features: Mapping) -> list[int]:
        """Number of tokens of each video, from its features (a mapping with `local_features`, `(L, d)` each)."""
        return [self.total_video_tokens(len(local)) for local in video_features["local_features"]]

    def replace_video_token(self, video_inputs: Mapping, video_idx: int, **kwargs) -> str:
        """The prompt text for video `video_idx` of the video processor's output."""
        counts = video_inputs.get("num_frames")
        num_frames = len(video_inputs["pixel_values_videos"][video_idx]) if counts is None else counts[video_idx]
        return self._video_text(self.num_video_tokens(int(num_frames)))

    def _video_text(self, count: int) -> str:
        tokens = self.video_token * count
        return self.video_start_token + tokens + self.video_end_token if self.video_delimiters else tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """For inference servers. `video_sizes`: `(frames, height, width)` each. Images have no tokens."""
        data = {}
        if image_sizes is not None:
            data["num_image_tokens"] = [0] * len(image_sizes)
            data["num_image_patches"] = [0] * len(image_sizes)
        if video_sizes is not None:
            data["num_video_tokens"] = [self.num_video_tokens(frames) for frames, *_ in video_sizes]
        return MultiModalData(**data)

    # --- texts and videos ---

    def __call__(
        self,
        text: str | list[str] | None = None,
        videos=None,
        video_token_counts: int | Sequence[int] | None = None,
        *,
        video_features: Mapping | None = None,
        video_options: Sequence[Mapping | None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`):
                Prompts with one `<vid_patch>` (or `<video>`, the original's mark) per video, with or without
                `<vid_start>` and `<vid_end>` around it. It is searched for special tokens, so user text must go
                through `escape_special_text` first, or through `apply_chat_template`, which does that.
            videos:
                One video, a list of videos in the order of their placeholders, or a list per text (`[]` or `None` for
                one without video). `LongVLMVideoProcessor.preprocess` says what a video can be.
            video_token_counts (`int` or a sequence of them):
                Instead of `videos`, if their features are already encoded: the number of tokens of each. Also taken
                by its earlier name, `num_video_tokens`.
            video_features (`Mapping`):
                Instead of `video_token_counts`: the features themselves (`local_features`), whose tokens are counted.
            video_options (`list[dict]`, *optional*):
                Options of the video processor for single videos, over those in `kwargs`: one dict (or `None`) per
                video, in the order of their placeholders.
            progress: called as `progress("decode", done, total)` while frames are decoded.
            kwargs:
                Options of the tokenizer (`padding`, `truncation`, `return_tensors`...) and of the video processor
                (`num_frames`, `fps`...). With `return_tensors`, several texts are padded unless `padding` is given.
        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` `(texts, length)`; with videos also
            `pixel_values_videos` float32 `(videos, max_frames, 3, H, W)` and `num_frames` int64 `(videos,)`.
            On request `video_metadata` (`return_metadata=True`), `mm_token_type_ids` (2 at video tokens;
            `return_mm_token_type_ids=True`) and `text_replacement_offsets` (`return_text_replacement_offsets=True`).
        Raises:
            ValueError: placeholders and videos differ in number, or truncation would cut a video.
        """
        for name in ("images", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"LongVLM takes text and videos, not {name}; remove {name}=")
        for name in ("load_audio_from_video", "sanitize_control_tokens"):
            kwargs.pop(name, None)
        earlier_name = kwargs.pop("num_video_tokens", None)
        if earlier_name is not None:
            if video_token_counts is not None:
                raise ValueError("num_video_tokens is the earlier name of video_token_counts; pass the latter")
            video_token_counts = earlier_name
        if video_features is not None:
            if video_token_counts is not None:
                raise ValueError("video_features and video_token_counts exclude each other; pass one of them")
            video_token_counts = self.count_video_tokens(video_features)
        if isinstance(videos, Sequence) and not isinstance(videos, (list, tuple, str, bytes, bytearray, memoryview)):
            videos = list(videos)  # a column of a data set
        texts = None if text is None else _as_texts(text)
        rows = _videos_per_text(videos, texts)
        videos = _drop_empty_rows(videos)
        if videos is not None and video_token_counts is not None:
            raise ValueError("videos and video_token_counts exclude each other; pass one of them")
        counts = _as_counts(video_token_counts)
        names = {name for one in video_options or () for name in one or ()}
        if counts:
            given = {**kwargs.get("videos_kwargs", {}), **kwargs}
            names |= {name for name in _WHICH_FRAMES if given.get(name) is not None}
        if videos is None and names:
            listed = ", ".join(sorted(names))
            raise ValueError(f"{listed} cannot be applied to encoded videos: give the videos themselves")
        if texts is None and videos is None:
            raise ValueError("LongVLMProcessor was called without text and without videos; pass at least one")
        if texts is not None:
            texts = [self._one_token_per_video(sample) for sample in texts]
            self._check_placeholders(texts, len(counts) if videos is None else len(flatten_videos(videos)), rows)

        offered = {name: kwargs.pop(name, False) for name in _EXTRA_OUTPUTS}
        wants_metadata = kwargs.get("return_metadata") or kwargs.get("videos_kwargs", {}).get("return_metadata")
        kwargs = {key: _plain_options(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        kwargs = _plain_options(kwargs)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        video_inputs: Mapping = {}
        replacements = [self._video_text(count) for count in counts]
        if videos is not None:
            if progress is not None:
                merged["videos_kwargs"]["progress"] = progress
            if video_options is not None:
                merged["videos_kwargs"]["video_options"] = video_options
            video_inputs, replacements = self._process_videos(videos, **merged["videos_kwargs"])
        text_inputs: dict[str, Any] = {}
        text_kwargs = merged["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        if texts is not None:
            offered = {name: text_kwargs.pop(name, False) or value for name, value in offered.items()}
            if return_tensors is not None and len(texts) > 1:
                text_kwargs.setdefault("padding", True)
            texts, offsets = self.get_text_with_replacements(texts, videos_replacements=replacements)
            text_inputs = self._tokenize(texts, **text_kwargs)
            if offered["return_text_replacement_offsets"]:
                text_inputs["text_replacement_offsets"] = offsets
            if offered["return_mm_token_type_ids"]:
                text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
        data = {**text_inputs, **video_inputs}
        if not wants_metadata:
            data.pop("video_metadata", None)
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _process_videos(self, videos, **kwargs):
        """Returns the video processor's output, and the prompt text for each video."""
        video_inputs = self.video_processor(videos, **kwargs)
        count = len(video_inputs["pixel_values_videos"])
        return video_inputs, [self.replace_video_token(video_inputs, video_idx=i) for i in range(count)]

    def _one_token_per_video(self, text: str) -> str:
        """Turns `<video>`, and placeholders that already have their delimiters, into the bare `<vid_patch>`."""
        text = text.replace(VIDEO_ALIAS, self.video_token)
        return text.replace(self.video_start_token + self.video_token + self.video_end_token, self.video_token)

    def _check_placeholders(self, texts: list[str], num_videos: int, rows: list[int] | None):
        placeholders = [sample.count(self.video_token) for sample in texts]
        if sum(placeholders) != num_videos:
            raise ValueError(
                f"the text has {sum(placeholders)} placeholder(s) for a video, but {num_videos} video(s) were "
                f"given; write one {self.video_token} per video"
            )
        for row, (needed, given) in enumerate(zip(placeholders, rows or placeholders, strict=True)):
            if needed != given:
                raise ValueError(
                    f"text {row} has {needed} placeholder(s) for a video, but {given} video(s) were given "
                    f"for it; write one {self.video_token} per video"
                )

    def _tokenize(self, texts: list[str], **text_kwargs) -> dict[str, Any]:
        tokenizer = self.tokenizer
        for sample in texts:
            try:
                sample.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text is not valid Unicode (a lone surrogate at character {error.start}): it was read with "
                    "the wrong encoding; give it as UTF-8"
                ) from None
        if any(ESCAPE_MARK in sample for sample in texts):
            tokenizer = tokenizer_for_escaped_text(tokenizer)
        bos = tokenizer.bos_token
        if bos and all(sample.startswith(bos) for sample in texts):  # written by the chat template
            text_kwargs.setdefault("add_special_tokens", False)
        encoded = dict(tokenizer(texts, **text_kwargs))
        if not text_kwargs.get("return_token_type_ids"):
            encoded.pop("token_type_ids", None)  # some tokenizers return them unasked, and no LLM takes them
        for row, (sample, ids) in enumerate(zip(texts, encoded["input_ids"], strict=False)):
            if any(ids.count(tokenizer.convert_tokens_to_ids(token)) != sample.count(token) for token in VIDEO_TOKENS):
                self._raise_cut_video(tokenizer, row, sample, text_kwargs)
        return encoded

    def _raise_cut_video(self, tokenizer, row: int, sample: str, text_kwargs: dict):
        options = {key: value for key, value in text_kwargs.items() if key == "add_special_tokens"}
        ids = tokenizer(sample, **options)["input_ids"]
        of_video = [i for i, token in enumerate(ids) if token in self._video_token_id_set()]
        needed = of_video[-1] + 1
        if tokenizer.truncation_side == "left":  # what the tokenizer adds in front is kept
            added = tokenizer.num_special_tokens_to_add() if text_kwargs.get("add_special_tokens", True) else 0
            needed = len(ids) - of_video[0] + added
        raise ValueError(
            f"max_length={text_kwargs.get('max_length') or tokenizer.model_max_length} would cut the video tokens of "
            f"text {row}: it needs at least max_length={needed}, or {len(ids)} for all of it; or use fewer frames"
        )

    def _video_token_id_set(self) -> set[int]:
        return {self.video_token_id, self.video_start_token_id, self.video_end_token_id}

    # --- chats ---

    def escape_special_text(self, text: str) -> str:
        """
        Makes user text safe to put into a prompt: what looks like a special token in it stays text.

        The result has an invisible mark in each such string; without such strings it is `text` itself. The processor
        drops the marks when it makes token ids, and `decode` gives the text as it was typed.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, not {type(text).__name__}: {text!r:.80}")
        return escape(text, self._special_strings())

    def _special_strings(self, of_answer: bool = False) -> list[str]:
        # Not special to the tokenizer, but still control tokens: `<think>`, `<tool_call>`, LLaVA's `<im_patch>`.
        # Answers may contain them (a template may look for the end of the thinking, for instance).
        added = self.tokenizer.added_tokens_decoder.values()
        strings = [str(t) for t in added if t.special or (not of_answer and re.fullmatch(r"<\S+>", str(t)))]
        return [*strings, *self.tokenizer.all_special_tokens, *VIDEO_TOKENS, VIDEO_ALIAS]

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        r"""
        Turns a conversation, or a list of them, into a prompt, or with `tokenize=True` into the model's input.

        Content is a string or a list of parts, `{"type": "text", "text": ...}` and `{"type": "video", "video": ...}`
        (or `"path"` or `"url"`; with none of them, a placeholder whose video is given as `videos=` or
        `video_token_counts=`). A video part can also hold options of the video processor: `"num_frames": 50`
        (or `"nframes"`), `"fps": 1`, `"video_start": 60`...
        Messages and parts may also be objects with these attributes: dataclasses, pydantic models.
        Most templates read content as a string: a line feed separates a placeholder from neighbouring text, as in the
        original; neighbouring texts are joined as they are. A template that reads parts (`message.content[0].text`)
        gets parts, and writes `<vid_patch>` or `<video>` for a video; if it does not, it gets the string in one part.
        A system message replaces that of a built-in template. Content is never searched for special tokens.

        Args:
            conversation: list of messages `{"role", "content"}`, or a list of such lists.
            chat_template: a template, or the name of one (built-in, or from the processor's dict of templates).
            tools, documents: passed to the template.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: leave the last message open, so that the model continues it.
            return_assistant_tokens_mask: add `assistant_masks`, 1 inside the template's `generation` blocks.
            tokenize: return token ids and pixel values instead of the prompt.
            return_tensors: as in `__call__`.
            return_dict: with `tokenize`, return a `BatchFeature` with everything the model takes; False, as in
                transformers: `input_ids` alone.
            load_audio_from_video: ignored, sound is not used (servers set it for every processor).
            processor_kwargs: options of `__call__`; they may also be given in `kwargs`.
            kwargs: variables of the template, and options of `__call__`.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other; pass one of them")
        if continue_final_message and return_assistant_tokens_mask:
            raise ValueError("continue_final_message has no assistant mask, since the last message is unfinished")
        if tokenize and return_assistant_tokens_mask and not return_dict:
            raise ValueError("return_assistant_tokens_mask=True needs return_dict=True: the mask is part of the dict")
        chat_template = self._find_template(chat_template)
        conversations, is_batched = _as_conversations(conversation)
        conversations = [plain_messages(messages) for messages in conversations]
        kwargs.pop("sanitize_control_tokens", None)  # 5.24's way for single calls; here content is always text
        template_kwargs, call_kwargs = self._split_kwargs(kwargs, chat_template)

        prompts, spans, flat = self._render(
            conversations,
            chat_template,
            tools=tools,
            documents=documents,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **template_kwargs},
        )
        if not tokenize:
            return prompts if is_batched else prompts[0]

        call_kwargs = {**(processor_kwargs or {}), **call_kwargs}
        if return_tensors not in (None, "auto"):
            call_kwargs["return_tensors"] = return_tensors
        if return_assistant_tokens_mask:
            call_kwargs.update(return_offsets_mapping=True, return_text_replacement_offsets=True)
        if call_kwargs.get("num_frames") is not None or call_kwargs.get("fps") is not None:
            call_kwargs.setdefault("do_sample_frames", True)
        sources = [videos for _, videos, _ in flat]
        if any(isinstance(video, Mapping) and "local_features" in video for videos in sources for video in videos):
            raise ValueError(
                'a video part holds features; leave it empty, {"type": "video"}, and pass them as video_features='
            )
        options = [one for _, _, parts in flat for one in parts]
        if any(options):
            call_kwargs["video_options"] = options
        if any(sources):
            if call_kwargs.get("videos") is not None:
                raise ValueError("videos= and videos inside the conversation exclude each other; use one of them")
            call_kwargs["videos"] = sources
        out = self(prompts, **call_kwargs)
        if return_assistant_tokens_mask:
            masks = assistant_masks(spans, out.pop("offset_mapping"), out.pop("text_replacement_offsets"))
            out.update(BatchFeature({"assistant_masks": masks}, tensor_type=call_kwargs.get("return_tensors")))
        return out if return_dict else out["input_ids"]

    def _render(self, conversations: list[list[dict]], chat_template: str, **options) -> tuple[list, list, list]:
        """Returns prompts, the spans of answers in them, and what `_flatten_conversation` returns for each."""
        try:
            form = content_form(chat_template)
            flat = [self._flatten_conversation(messages, form) for messages in conversations]
            if form != STRING and not self._writes_videos(flat, chat_template, options):
                flat = [self._flatten_conversation(messages, form, text_only=True) for messages in conversations]
            prompts, spans = _render_all(flat, chat_template, options)
        except Exception as error:
            if not _is_refusal(error):
                raise
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        if spans:  # a template of parts may write a video in another way
            spans = [
                [tuple(len(self._one_token_per_video(prompt[:edge])) for edge in span) for span in row]
                for prompt, row in zip(prompts, spans, strict=True)
            ]
        return [self._one_token_per_video(prompt) for prompt in prompts], spans, flat

    def _writes_videos(self, flat: list, chat_template: str, options: dict) -> bool:
        """Whether a template that reads parts writes a placeholder for each video."""
        if not any(video_options for _, _, video_options in flat):
            return True
        try:
            prompts, _ = _render_all(flat, chat_template, options)
        except Exception as error:  # it may expect a text where the video is
            if not _is_refusal(error):
                raise
            return False
        written = [prompt.count(self.video_token) + prompt.count(VIDEO_ALIAS) for prompt in prompts]
        return all(count >= len(parts) for count, (_, _, parts) in zip(written, flat, strict=True))

    def plain_messages(self, conversation) -> list[dict]:
        """
        The messages of a conversation, in any form that `apply_chat_template` takes, as dicts.

        Raises:
            ValueError: a message without a role.
        """
        return plain_messages(conversation)

    def take_videos(self, messages) -> tuple[list[dict], list[VideoPart]]:
        """
        Separates a conversation from its videos.

        Args:
            messages: list of messages, as in `apply_chat_template`.

        Returns:
            The same messages with empty video parts, `{"type": "video"}`, and the videos in order;
            `VideoPart(None, {})` for a part that was empty before.

        Raises:
            ValueError: a part of another type, or an option that the video processor does not have.
        """
        taken: list[VideoPart] = []
        bare: list[dict] = []
        for message in plain_messages(messages):
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                parts: list[Any] = []
                for part in content:
                    kind, value = _read_part(part)
                    if kind == "video":
                        taken.append(VideoPart(value, self._video_options(part)))
                        part = {"type": "video"}
                    parts.append(part)
                message["content"] = parts
            bare.append(message)
        return bare, taken

    def _video_options(self, part: Mapping) -> dict[str, Any]:
        """The options in a video part, by their own names."""
        given = {name: value for name, value in part.items() if name not in _VIDEO_PART_KEYS}
        if isinstance(part.get("video_url"), Mapping):
            given |= {name: value for name, value in part["video_url"].items() if name != "url"}
        known = self.video_processor.valid_kwargs.__annotations__.keys() - _NOT_OF_ONE_VIDEO
        options: dict[str, Any] = {}
        for alias in _ALIASES.keys() & given.keys():
            if _ALIASES[alias] in given:
                raise ValueError(
                    f'a video part has both "{alias}" and "{_ALIASES[alias]}", which mean the same; give one'
                )
        for written, value in given.items():
            name = _ALIASES.get(written, written)
            if name not in known:
                raise ValueError(
                    f'a video part has the key "{written}", which is not an option of the video processor; options '
                    "are num_frames, fps, max_frames, video_start, video_end, short_video..."
                )
            if value is not None:
                options[name] = value
        return options

    def _find_template(self, name: str | None) -> str:
        known = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if name is None:
            if "default" not in known:
                raise ValueError(f"pass chat_template=, one of {', '.join(known)}: none of them is the default")
            return known["default"]
        return known[name] if name in known else _template_text(name)

    def _split_kwargs(self, kwargs: dict, chat_template: str) -> tuple[dict, dict]:
        """Splits into variables of the template and options of `__call__`."""
        options = {"videos", "video_features", "progress", "common_kwargs", *_EXTRA_OUTPUTS}
        options |= {"video_token_counts", "num_video_tokens"}
        options |= ProcessingKwargs.__annotations__.keys()
        for name in ("text_kwargs", "videos_kwargs"):
            options |= ProcessingKwargs.__annotations__[name].__annotations__.keys()
        options |= self.video_processor.valid_kwargs.__annotations__.keys()
        for name in kwargs:
            if name not in options and not re.search(rf"\b{re.escape(name)}\b", chat_template):
                logger.warning_once(
                    f"apply_chat_template: {name}= is neither an option nor a variable of the template"
                )
        return (
            {key: value for key, value in kwargs.items() if key not in options},
            {key: value for key, value in kwargs.items() if key in options},
        )

    def _flatten_conversation(
        self, messages: list[dict], form: str, text_only: bool = False
    ) -> tuple[list[dict], list, list[dict]]:
        """
        Returns messages with content in the form that the template reads, the given videos, and the options of each
        video part. Videos are written as `<vid_patch>` in strings, and with `text_only` also in parts.
        """
        flat: list[dict] = []
        videos: list = []
        options: list[dict] = []
        for message in messages:
            strings = self._special_strings(of_answer=message["role"] == "assistant")
            content = message.get("content")
            parts = self._join_parts(content, videos, options)
            if form != PARTS and (form != AS_GIVEN or content is None or isinstance(content, str)):
                flat.append({**message, "content": self._as_string(parts, strings)})
            elif text_only and None in parts:
                flat.append({**message, "content": [{"type": "text", "text": self._as_string(parts, strings)}]})
            else:
                flat.append({**message, "content": _as_parts(content, strings)})
        return flat, videos, options

    def _join_parts(self, content, videos: list, options: list[dict]) -> list[str | None]:
        """Texts and videos (`None`). Neighbouring texts are joined: together they may spell a special token."""
        if content is None or isinstance(content, str):
            return [content] if content else []
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"content must be text or a list of parts, not {type(content).__name__}: {content!r:.80}")
        parts: list[str | None] = []
        for part in content:
            kind, value = _read_part(part)
            if kind == "video":
                parts.append(None)
                options.append(self._video_options(part))
                if value is not None:
                    videos.append(value)
            elif parts and parts[-1] is not None:
                parts[-1] += value
            elif value:
                parts.append(value)
        return parts

    def _as_string(self, parts: list[str | None], special_strings: list[str]) -> str:
        return "\n".join(self.video_token if p is None else escape(p, special_strings) for p in parts)


_VIDEO_PART_KEYS = {"type", "video", "path", "url", "video_url"}
_ALIASES = {"nframes": "num_frames"}  # as chats for Qwen's models write it
# Options of a call that a single video cannot have, or that do nothing here.
_NOT_OF_ONE_VIDEO = {
    "return_tensors",
    "return_metadata",
    "data_format",
    "device",
    "default_to_square",
    "do_convert_rgb",
    "do_pad",
}
# Options that say which frames of a video are taken.
_WHICH_FRAMES = ("num_frames", "fps", "video_stream", *SAMPLING)
_EXTRA_OUTPUTS = ("return_mm_token_type_ids", "return_text_replacement_offsets")


def _render_all(flat: list, chat_template: str, options: dict) -> tuple[list, list]:
    messages = [messages for messages, _, _ in flat]
    return render_jinja_template(conversations=messages, chat_template=chat_template, **options)


def _is_refusal(error: Exception) -> bool:
    """Whether a template raised it. By its module: this file must not need jinja2 to be loaded."""
    return type(error).__module__.partition(".")[0] == "jinja2"


def _prepare_tokenizer(tokenizer):
    # Also if the tokenizer has them: that makes them special (in old files they are ordinary added words).
    # normalized=False: they are found in the text as it was written.
    tokens = [AddedToken(token, special=True, normalized=False) for token in VIDEO_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"


def _template_text(name: str) -> str:
    """A built-in template by its name; a template is returned as it is. One word without marks is a mistaken name."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(
            f'chat_template="{name}" is neither a Jinja template nor a built-in one; choose one of '
            f"{', '.join(CHAT_TEMPLATES)}"
        )
    return name


def _plain_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the tokenizer and the video processor with plain numbers, which their type checks need."""
    plain = plain_video_options(kwargs)
    for name, least in (("max_length", 1), ("stride", 0), ("pad_to_multiple_of", 1)):
        if plain.get(name) is not None:
            plain[name] = whole_number(name, plain[name], least)
    return plain


def _as_texts(text) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"text must be a string or a list of strings, not {type(text).__name__}: {text!r:.80}")
    for row, sample in enumerate(texts):
        if not isinstance(sample, str):
            raise ValueError(f"text {row} must be a string, not {type(sample).__name__}: {sample!r:.80}")
    if not texts:
        raise ValueError("text is an empty list; pass at least one text")
    return list(texts)


def _as_counts(given) -> list[int]:
    if given is None:
        return []
    counts = [given] if isinstance(given, Number) else given
    return [whole_number("video_token_counts", count, 1) for count in counts]


def _is_empty(row) -> bool:
    return row is None or (isinstance(row, (list, tuple)) and not row)


def _drop_empty_rows(videos):
    if isinstance(videos, (list, tuple)):
        videos = [row for row in videos if not _is_empty(row)]
    return None if _is_empty(videos) else videos


def _videos_per_text(videos, texts: list[str] | None) -> list[int] | None:
    """Number of videos of each text if `videos` is a list per text; `None`: a flat list, or one video."""
    if texts is None or not isinstance(videos, (list, tuple)) or len(videos) != len(texts):
        return None
    flat = [[] if _is_empty(row) else flatten_videos([row]) for row in videos]
    # A video that is itself a list (of frames) is an element of a flat list.
    lists = all(row is None or isinstance(row, (list, tuple)) for row in videos)
    nested = any(not found or found[0] is not row for row, found in zip(videos, flat, strict=True))
    return [len(found) for found in flat] if lists and nested else None


def _as_conversations(conversation) -> tuple[list, bool]:
    if hasattr(conversation, "messages"):
        return [conversation], False
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"a conversation must be a list of messages, not {conversation!r:.80}")
    if not is_message(conversation[0]) and (
        isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    ):
        return list(conversation), True
    return [conversation], False


def _as_parts(content, special_strings: list[str]) -> list[dict]:
    """Content for a template that reads parts. Other text may follow each part, as the template likes."""
    if content is None:
        return []
    read = [("text", content)] if isinstance(content, str) else [_read_part(part) for part in content]
    last = max((i for i, (kind, _) in enumerate(read) if kind == "text"), default=0)
    return [
        {"type": "video"}
        if kind == "video"
        else {"type": "text", "text": escape(value, special_strings, continues=i < last)}
        for i, (kind, value) in enumerate(read)
    ]


def _read_part(part) -> tuple[str, Any]:
    """Returns ("text", text) or ("video", the video or None)."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f'"text" of a text part must be a string, not {type(text).__name__}: {text!r:.80}')
        return "text", text
    if kind == "video_url":  # as OpenAI's API writes it
        url = part.get("video_url")
        return "video", url.get("url") if isinstance(url, Mapping) else url
    if kind == "video":
        return "video", next((part[key] for key in ("video", "path", "url") if part.get(key) is not None), None)
    raise ValueError(f'LongVLM takes parts of type "text" and "video", not {kind or repr(part):.80}')


def assistant_masks(spans, offset_mapping, replacement_offsets) -> list[list[int]]:
    """1 for each token that overlaps a span `[start, end)` of characters of its prompt before videos were expanded."""
    masks = []
    for row, offsets in enumerate(offset_mapping):

        def moved(position, row=row):
            before = [r for r in replacement_offsets[row] if r["span"][1] <= position]
            return position + before[-1]["new_span"][1] - before[-1]["span"][1] if before else position

        answers = [(moved(start), moved(end)) for start, end in spans[row]]
        masks.append([int(any(a < end and b > start for start, end in answers)) for a, b in offsets])
    return masks


LongVLMProcessor.register_for_auto_class("AutoProcessor")
