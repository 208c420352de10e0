"""`pipeline("video-question-answering")`: a video and a question in, an answer out.

    pipe = pipeline("video-question-answering", model=folder, trust_remote_code=True)
    pipe(video="film.mp4", question="Who opens the door?")  # {"answer": "..."}

A second question about the same video neither decodes nor encodes it again (`feature_cache_longvlm.py`).
"""

from typing import NamedTuple

import torch
from transformers import Pipeline

from .engine_longvlm import LongVLMEngine
from .pipeline_inputs_longvlm import arrange_inputs
from .plain_numbers import whole_number

# The options of a call that go to the video processor; all others go to `generate()`.
_VIDEO_OPTIONS = (
    "num_frames",
    "nframes",
    "fps",
    "max_frames",
    "short_video",
    "video_start",
    "video_end",
    "video_stream",
    "decoding_backend",
    "do_sample_frames",
    "video_metadata",
)
# Those that a row may have of its own. Columns with the other names tell how a video was made, not what to take.
_WINDOW = ("video_start", "video_end")


class _Question(NamedTuple):
    """One conversation on its way through the pipeline. The base class would take a bare list for a batch."""

    messages: list[dict]


class VideoQuestionAnsweringPipeline(Pipeline):
    """Answers questions about videos.

    Args:
        video_cache_bytes (`int`, defaults to 256 MiB): limit on the features that are kept for further questions; 0
            keeps nothing. `pipe.video_cache.clear()` drops them.
        kwargs: as in [`Pipeline`]; options of a call given here become its defaults.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    # The base class would make its own generation configuration, and not the same one in each version.
    _pipeline_calls_generate = False

    def __init__(self, *args, video_cache_bytes: int = 256 << 20, **kwargs):
        super().__init__(*args, **_plain_loading_options(kwargs))
        if self.processor is None:
            raise ValueError(
                "a pipeline made from a model object also needs its processor: pipeline(..., processor=...)"
            )
        self.engine = LongVLMEngine(self.model, self.processor, cache_bytes=video_cache_bytes)

    @property
    def video_cache(self):
        """The engine's cache of features."""
        return self.engine.cache

    def __call__(self, inputs=None, *, video=None, question=None, **kwargs):
        """
        Args:
            inputs (`dict` or list of `dict`, *optional*): `{"video": ..., "question": ...}`, a list of them, an
                iterator, or a data set with these columns (of `datasets` or of torch). `"video_start"` and
                `"video_end"` may be there, too; other keys are ignored. Together with `question`: the videos, such as
                `KeyDataset(dataset, "video")`.
            video: instead of `inputs`: a path, URL, bytes, a row of a Video column, a folder of images or a list of
                frames; or several videos (a list, a column of a data set, an iterator), one for each question.
            question (`str` or `list[str]`): instead of `inputs`: one question, or several. With a single video, all
                are about it.
            batch_size (`int`, *optional*): how many questions go through the LLM together.
            return_full_text (`bool`, *optional*): put the prompt before the answer.
            system (`str`, *optional*): system message that replaces the chat template's own.
            chat_template (`str`, *optional*): another chat template, or the name of a built-in one.
            num_frames, fps, max_frames, short_video, video_start, video_end, video_stream, decoding_backend: as in the
                video processor.
            progress (`Callable`, *optional*): called as `progress(stage, done, total)`, in frames, with the stages
                `"decode"` and `"encode"`.
            stop_sequence (`str` or `list[str]`, *optional*): as in other pipelines: the same as `stop_strings`.
            kwargs: options of `generate()` such as `max_new_tokens` (default 256), `do_sample`, `streamer`,
                `stop_strings` (a string that ends the answer, which it is part of, or a list of them).

        Returns:
            `{"answer": str}`; for a list of inputs, a list; for a data set or an iterator, an iterator. With
            `num_return_sequences` above 1, each answer is a list.

        Raises:
            VideoDecodeError: a video cannot be read.
            ValueError: the inputs do not have this form, a question is empty, or one is longer than the LLM's context.
        """
        inputs = arrange_inputs(inputs, video, question)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **_plain_loading_options(kwargs))

    def _sanitize_parameters(
        self,
        return_full_text=None,
        system=None,
        chat_template=None,
        progress=None,
        stop_sequence=None,
        generate_kwargs=None,
        **kwargs,
    ):
        video_options = {name: kwargs.pop(name) for name in _VIDEO_OPTIONS if name in kwargs}
        preprocess = {"system": system, **video_options}
        asked = {"progress": progress, "chat_template": chat_template, "return_full_text": return_full_text}
        forward = {**asked, **kwargs, **(generate_kwargs or {})}
        if stop_sequence is not None:
            if forward.get("stop_strings") is not None:
                raise ValueError("stop_sequence and stop_strings are the same: give one of them")
            forward["stop_strings"] = stop_sequence
        return tuple(
            {name: value for name, value in params.items() if value is not None}
            for params in (preprocess, forward, {})
        )

    def preprocess(self, inputs: dict, system=None, **video_options) -> dict:
        if not isinstance(inputs, dict) or not {"video", "question"} <= inputs.keys():
            raise ValueError('an input must be a dict with "video" and "question", got ' + _describe(inputs))
        video, question = inputs["video"], inputs["question"]
        if not isinstance(question, str):
            raise ValueError(f"the question must be text (str), got {_describe(question)}")
        if video is None:
            raise ValueError("video is None: give a path, URL, bytes or frames")
        window = {name: inputs[name] for name in _WINDOW if inputs.get(name) is not None}
        content = [{"type": "video", "video": video, **video_options, **window}, {"type": "text", "text": question}]
        messages: list[dict] = [{"role": "system", "content": system}] if system is not None else []
        # The engine reads the video, piece by piece: all frames of a long video would fill the memory.
        return {"question": _Question([*messages, {"role": "user", "content": content}])}

    def _forward(self, model_inputs: dict, **options) -> dict:
        questions = model_inputs["question"]
        batched = not isinstance(questions, _Question)  # the base class hands over a single input as it is
        options.pop("return_dict_in_generate", None)  # the engine asks for it if needed
        conversations = [question.messages for question in (questions if batched else [questions])]
        answers = self.engine.generate(conversations, **options)
        return {"answer": answers} if batched else {"answer": answers[0]}

    def postprocess(self, model_outputs: dict) -> dict:
        return {"answer": model_outputs["answer"]}

    def _ensure_tensor_on_device(self, inputs, device):
        # Frames stay where they are: the model moves a few at a time.
        return inputs

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Writes the model, its processor and the code into a folder that `pipeline()` can load."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _plain_loading_options(options: dict) -> dict:
    """With the numbers that the base class gives to a `DataLoader` as plain ones."""
    limits = {"batch_size": 1, "num_workers": 0}
    given = {name: options[name] for name in limits if options.get(name) is not None}
    return {**options, **{name: whole_number(name, value, limits[name]) for name, value in given.items()}}


def _describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


__all__ = ["VideoQuestionAnsweringPipeline"]
