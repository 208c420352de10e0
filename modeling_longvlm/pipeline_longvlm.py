"""`pipeline("video-question-answering")`: a video and a question in, an answer out.

    pipe = pipeline("video-question-answering", model=folder, trust_remote_code=True)
    pipe(video="film.mp4", question="Who opens the door?")  # {"answer": "..."}

A second question about the same video neither decodes nor encodes it again (`feature_cache_longvlm.py`).
"""

from typing import Any, NamedTuple

import torch
from transformers import Pipeline

from .feature_cache_longvlm import VideoFeatureCache, video_key

# Options of a call that are the video processor's; all others are those of `generate()`.
_VIDEO_OPTIONS = (
    "num_frames",
    "fps",
    "max_frames",
    "short_video",
    "decoding_backend",
    "do_sample_frames",
    "video_metadata",
)
_DEFAULT_MAX_NEW_TOKENS = 256


class _Video(NamedTuple):
    """One video on its way: its name in the cache (`None`: it has none), and how it is read."""

    key: Any
    source: Any
    options: dict


class VideoQuestionAnsweringPipeline(Pipeline):
    """Answers questions about videos.

    Args:
        video_cache_bytes (`int`, defaults to 256 MiB): how much of the features of earlier videos is kept for further
            questions; 0 keeps nothing. `pipe.video_cache.clear()` forgets them.
        kwargs: as in [`Pipeline`]; options of a call may be given here as defaults.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    # The base class would build a generation configuration of its own, in a way that differs between versions.
    _pipeline_calls_generate = False

    def __init__(self, *args, video_cache_bytes: int = 256 << 20, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "A pipeline made from a model object also needs its processor: pipeline(..., processor=...)."
            )
        self.video_cache = VideoFeatureCache(video_cache_bytes)

    def __call__(self, inputs=None, *, video=None, question=None, **kwargs):
        """
        Args:
            inputs (`dict` or list of `dict`, *optional*): `{"video": ..., "question": ...}`, or several of them, or a
                dataset of them.
            video: instead of `inputs`: a path, URL, bytes, a directory of pictures or a list of frames; or a list of
                paths, as many as there are questions.
            question (`str` or `list[str]`): instead of `inputs`: one question, or several. With one video and several
                questions, all are about that video.
            batch_size (`int`, *optional*): how many questions go through the LLM together.
            return_full_text (`bool`, *optional*): the answer with the prompt before it; default: the answer only.
            system (`str`, *optional*): system message instead of the chat template's own.
            chat_template (`str`, *optional*): another chat template, or the name of a built-in one.
            num_frames, fps, max_frames, short_video, decoding_backend: as in the video processor.
            progress (`Callable`, *optional*): called as `progress(stage, done, total)` in frames, with `stage`
                `"decode"` or `"encode"`.
            kwargs: options of `generate()` such as `max_new_tokens` (default 256), `do_sample`, `streamer`.

        Returns:
            `{"answer": str}`, or a list of them for several inputs. With `num_return_sequences` the answer is a list.

        Raises:
            VideoDecodeError: if a video cannot be read.
            ValueError: if a question is not text.
        """
        if inputs is None:
            inputs = _pair_up(video, question)
        elif video is not None or question is not None:
            raise ValueError("Give inputs, or video= and question=, not both.")
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, return_full_text=None, system=None, chat_template=None, progress=None, generate_kwargs=None, **kwargs
    ):
        video_options = {name: kwargs.pop(name) for name in _VIDEO_OPTIONS if name in kwargs}
        preprocess = {"system": system, "chat_template": chat_template, **video_options}
        forward = {"progress": progress, **kwargs, **(generate_kwargs or {})}
        postprocess = {"return_full_text": return_full_text}
        return tuple(
            {name: value for name, value in params.items() if value is not None}
            for params in (preprocess, forward, postprocess)
        )

    def preprocess(self, inputs: dict, system=None, chat_template=None, **video_options) -> dict:
        if not isinstance(inputs, dict) or not {"video", "question"} <= inputs.keys():
            raise ValueError('An input must be a dict with "video" and "question", got ' + _describe(inputs) + ".")
        video, question = inputs["video"], inputs["question"]
        if not isinstance(question, str):
            raise ValueError(f"The question must be text (str), got {_describe(question)}.")
        if video is None:
            raise ValueError("There is no video: video is None.")

        conversation = [{"role": "system", "content": system}] if system is not None else []
        content = [{"type": "video"}, {"type": "text", "text": question}]
        conversation.append({"role": "user", "content": content})
        options = {} if chat_template is None else {"chat_template": chat_template}
        prompt = self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False, **options
        )
        # The video is read in `_forward`, piece by piece: all frames of a long one would fill the memory.
        key = video_key(video)
        if key is not None:
            # The same file seen by other settings is another video.
            key = (key, repr(video_options), self.processor.video_processor.to_json_string(), self._method())
        return {"prompt": prompt, "video": _Video(key, video, video_options)}

    def _method(self) -> str:
        """All settings of the model that its features depend on."""
        config = self.model.config.to_dict()
        config.pop("text_config", None)
        return f"{self.model.dtype} {sorted(config.items(), key=lambda item: item[0])}"

    def _forward(self, model_inputs: dict, progress=None, **generate_kwargs) -> dict:
        prompts, videos = model_inputs["prompt"], model_inputs["video"]
        batched = isinstance(prompts, list)  # the base class hands over a single input as it is
        prompts, videos = (prompts, videos) if batched else ([prompts], [videos])

        features = self._features([_Video(*video) for video in videos], progress)
        global_tokens = self.model.config.num_global_tokens
        inputs = self.processor(
            text=prompts,
            num_video_tokens=[len(local) + global_tokens for local in features.local_features],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)

        settings = self.model.generation_config
        if not generate_kwargs.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            if settings.max_new_tokens is None:
                generate_kwargs["max_new_tokens"] = _DEFAULT_MAX_NEW_TOKENS
        if settings.pad_token_id is None:
            generate_kwargs.setdefault("pad_token_id", self.processor.tokenizer.pad_token_id)
        generate_kwargs["return_dict_in_generate"] = False
        generated = self.model.generate(**inputs, video_features=features, **generate_kwargs)

        each = len(generated) // len(prompts)  # num_return_sequences
        generated = generated.view(len(prompts), each, -1).tolist()
        length = inputs["input_ids"].shape[1]
        outputs = {"token_ids": generated, "prompt_length": [length] * len(prompts)}
        return outputs if batched else {name: value[0] for name, value in outputs.items()}

    def _features(self, videos: list[_Video], progress):
        """Of all videos in one; each is read and encoded once, whatever the cache holds."""
        known: dict[Any, Any] = {}
        features = []
        for video in videos:
            one = known.get(video.key) or self.video_cache.get(video.key) or self._encode(video, progress)
            self.video_cache.put(video.key, one)
            if video.key is not None:
                known[video.key] = one
            features.append(one)
        return type(features[0]).cat(features)

    def _encode(self, video: _Video, progress):
        options = dict(video.options)
        total = encoded = 0

        def on_read(done, all_frames):
            nonlocal total
            total = all_frames
            progress("decode", done, total)

        def on_encoded(tower, args, output):
            nonlocal encoded
            encoded += len(output[0])
            progress("encode", encoded, total)

        if progress is None:
            return self._encode_pieces(video.source, options)
        hook = self.model.base_model.vision_tower.register_forward_hook(on_encoded)
        try:
            return self._encode_pieces(video.source, {**options, "progress": on_read})
        finally:
            hook.remove()

    def _encode_pieces(self, source, options: dict):
        features = self.model.encode_video(self.processor.video_processor.iter_pixel_values(source, **options))
        return type(features).cat([features])  # what a question needs, and no more

    def postprocess(self, model_outputs: dict, return_full_text: bool = False) -> dict:
        start = 0 if return_full_text else model_outputs["prompt_length"]
        answers = [
            self.processor.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
            for ids in model_outputs["token_ids"]
        ]
        return {"answer": answers[0] if len(answers) == 1 else answers}

    def _ensure_tensor_on_device(self, inputs, device):
        # Frames stay where they are: the model takes a few at a time to its own device.
        return inputs

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """The model, its processor and the code, in a folder that `pipeline()` loads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _pair_up(video, question) -> dict | list[dict]:
    """One input, or as many as there are videos or questions."""
    if isinstance(video, (list, tuple)) and not _are_frames(video):
        videos = list(video)
    else:
        videos = list(video) if getattr(video, "ndim", 0) == 5 else None
    questions = list(question) if isinstance(question, (list, tuple)) else None
    if videos is None and questions is None:
        return {"video": video, "question": question}
    videos = [video] * len(questions) if videos is None else videos
    questions = [question] * len(videos) if questions is None else questions
    if len(videos) != len(questions):
        raise ValueError(
            f"{len(videos)} videos and {len(questions)} questions were given: give one question for each video, one "
            "video, or one question."
        )
    return [{"video": one, "question": text} for one, text in zip(videos, questions, strict=True)]


def _are_frames(videos) -> bool:
    """Whether a list is the frames of ONE video: pictures, or arrays of at most three dimensions."""
    first = videos[0] if len(videos) else None
    return hasattr(first, "getbands") or (hasattr(first, "ndim") and first.ndim <= 3)


def _describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


__all__ = ["VideoQuestionAnsweringPipeline"]
