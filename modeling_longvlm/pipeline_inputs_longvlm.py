"""What a pipeline is called with, as inputs `{"video", "question"}`: one, a list, or a data set that is read lazily.

Rows of `datasets` come as the files that they hold: decoding is the video processor's job, which does it exactly, and
only for the frames that it takes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from torch.utils.data import Dataset


class _Rows(Dataset):
    """The rows of a `datasets.Dataset`, which is no torch dataset."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class _Pairs(Dataset):
    """Videos and questions, as many of each."""

    def __init__(self, videos, questions):
        self.videos, self.questions = videos, questions

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        return {"video": self.videos[index], "question": self.questions[index]}


class _Same(Sequence):
    """One value for each of `length` rows."""

    def __init__(self, value, length: int):
        self.value, self.length = value, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):
        return self.value


def arrange_inputs(inputs=None, video=None, question=None):
    """
    The inputs of a call, in a form that the base class takes.

    Args:
        inputs: an input or a list of them; a data set or an iterator of inputs; or, next to `question` or `video`, the
            other of the two.
        video, question: one, or several: a list, a column of a data set, an iterator.

    Returns:
        One input or a list of them; a torch dataset or a generator, if they are to be read lazily.

    Raises:
        ValueError: they do not pair up.
    """
    if inputs is not None and (video is not None or question is not None):
        if (video is not None and question is not None) or _are_inputs(inputs):
            raise ValueError("give inputs, or video and question, not both")
        video, question = (inputs, question) if video is None else (video, inputs)
    elif inputs is not None:
        if _is_table(inputs):
            inputs = without_decoding(inputs)
            return inputs if isinstance(inputs, Dataset) else _Rows(inputs)  # streamed ones are torch's as well
        return (one for one in inputs) if _is_iterator(inputs) else inputs
    return _pair_up(video, question)


def without_decoding(data):
    """
    A data set of `datasets`, a column of it or a `KeyDataset`, with files (`{"bytes", "path"}`) in its Video columns
    instead of decoders; anything else as it is.
    """
    if hasattr(data, "source") and hasattr(data, "column_name"):  # dataset["video"]
        source = without_decoding(data.source)
        return data if source is data.source else source[data.column_name]
    if hasattr(data, "dataset") and hasattr(data, "key"):  # KeyDataset
        dataset = without_decoding(data.dataset)
        return data if dataset is data.dataset else type(data)(dataset, data.key)
    if not _is_table(data) or not isinstance(data.features, Mapping):
        return data
    for name, feature in data.features.items():
        if type(feature).__name__ == "Video" and getattr(feature, "decode", False):
            data = data.cast_column(name, dataclasses.replace(feature, decode=False))
    return data


def _pair_up(video, question):
    """One input, or as many as there are videos or questions."""
    videos, questions = _several_videos(without_decoding(video)), _several(without_decoding(question))
    if videos is None and questions is None:
        return {"video": video, "question": question}
    if _is_iterator(videos) or _is_iterator(questions):
        if videos is None:
            return ({"video": video, "question": text} for text in questions)
        if questions is None:
            return ({"video": one, "question": question} for one in videos)
        return ({"video": one, "question": text} for one, text in _in_step(videos, questions))
    videos = _Same(video, len(questions)) if videos is None else videos
    questions = _Same(question, len(videos)) if questions is None else questions
    if len(videos) != len(questions):
        raise ValueError(
            f"{len(videos)} videos and {len(questions)} questions were given: give one question for each video, one "
            "video, or one question"
        )
    pairs = _Pairs(videos, questions)
    lazy = any(not isinstance(several, (list, _Same)) for several in (videos, questions))
    return pairs if lazy else [pairs[i] for i in range(len(pairs))]


def _in_step(videos, questions) -> Iterator[tuple]:
    """Pairs of what is read lazily, whose number shows only at the end."""
    end = object()
    for count, pair in enumerate(zip_longest(videos, questions, fillvalue=end)):
        if pair[0] is end or pair[1] is end:
            fewer, more = ("videos", "questions") if pair[0] is end else ("questions", "videos")
            raise ValueError(f"the {fewer} end after {count}, the {more} do not: give one question for each video")
        yield pair


def _several_videos(video):
    """The videos, if there are several; `None`: it is one."""
    if isinstance(video, (list, tuple)):
        return None if _are_frames(video) else list(video)
    return list(video) if getattr(video, "ndim", 0) == 5 else _several(video)


def _several(value):
    """A list, a column or an iterator of several values; `None`: it is one."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    if isinstance(value, (list, tuple)):
        return list(value)
    if hasattr(value, "column_name") and not isinstance(value, Sequence):  # of a data set that is streamed
        return iter(value)
    return value if isinstance(value, (Sequence, Dataset)) or _is_iterator(value) else None


def _is_iterator(value) -> bool:
    return isinstance(value, Iterator) and not hasattr(value, "read")  # an open file is an iterator, too


def _is_table(value) -> bool:
    """Whether it is a data set of `datasets`, which need not be installed."""
    return hasattr(value, "features") and hasattr(value, "cast_column")


def _are_inputs(inputs) -> bool:
    if isinstance(inputs, (list, tuple)):
        return any(_are_inputs(one) for one in inputs)
    return _is_table(inputs) or (isinstance(inputs, Mapping) and not {"bytes", "path"} <= inputs.keys())


def _are_frames(videos) -> bool:
    """Whether a list is the frames of ONE video: images, or arrays of at most three dimensions."""
    first = videos[0] if len(videos) else None
    return hasattr(first, "getbands") or (hasattr(first, "ndim") and first.ndim <= 3)


__all__ = ["arrange_inputs", "without_decoding"]
