"""Chats with their videos, or with features of them, become one batch for the model.

    collator = LongVLMDataCollator(processor, max_length=2048)
    batch = collator([{"messages": [...]}, ...])

Training pads on the right (generation pads on the left). Videos are decoded here, in the data loader's workers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longvlm.modeling_longvlm.modeling_longvlm import LongVLMVideoFeatures
from longvlm.modeling_longvlm.plain_numbers import whole_number
from longvlm.training.chat_encoding import IGNORED, encode_chat, pad
from longvlm.training.formats import BadRow, as_messages


class LongVLMDataCollator:
    """
    Makes batches for `Trainer`. It also works with TRL's `SFTTrainer`, which needs `SFTConfig(max_length=None,
    remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})` next to `data_collator=` and
    `processing_class=processor`.

    Args:
        processor: a `LongVLMProcessor`.
        max_length: maximum length of a chat in tokens, including those of its videos.
        truncation: cut the end of a longer chat, as `encode_chat` does. Otherwise such a chat is an error here
            (`build_dataset` drops them beforehand).
        chat_template: replaces the processor's own.
        pad_to_multiple_of: lengths are rounded up to a multiple of it.
        video_options: options of the video processor (`num_frames`, `fps`...).
    """

    def __init__(
        self,
        processor,
        *,
        max_length: int | None = None,
        truncation: bool = False,
        chat_template: str | None = None,
        pad_to_multiple_of: int | None = None,
        video_options: Mapping[str, Any] | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.truncation = truncation
        self.chat_template = chat_template
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = whole_number("pad_to_multiple_of", pad_to_multiple_of, 1)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.video_options = dict(video_options or {})

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: rows of any form that `as_messages` knows. No video of a row is decoded if it has
                `"video_features"`, a list of one `LongVLMVideoFeatures` per video (of
                `StoredFeatures.as_video_features`).

        Returns:
            `input_ids`, `attention_mask`, `labels`: int64 `(batch, length)`. If there are videos, also
            `pixel_values_videos` float32 `(videos, max_frames, 3, H, W)` and `num_frames` int64 `(videos,)`, or
            `video_features`: `local_features`, `(L, d)` each, and `global_features` `(videos, E, d)`.

        Raises:
            ValueError: a row cannot be trained on, or some rows have features and others videos.
        """
        chats = [
            as_messages(example) if "video_features" not in example else example["messages"] for example in examples
        ]
        features = [list(example.get("video_features") or []) for example in examples]
        videos = [[] if features[i] else self.processor.take_videos(chat)[1] for i, chat in enumerate(chats)]
        if any(features) and any(videos):
            raise ValueError("a batch mixes features and videos; extract the features of all videos")
        batch_of_videos, counts = self._encode_features(features) if any(features) else self._encode_videos(videos)
        encoded = []
        for row, (chat, row_counts) in enumerate(zip(chats, counts, strict=True)):
            try:
                encoded.append(
                    encode_chat(
                        self.processor,
                        chat,
                        row_counts,
                        chat_template=self.chat_template,
                        max_length=self.max_length,
                        truncation=self.truncation,
                    )
                )
            except BadRow as error:
                where = examples[row].get("where") or f"row {row} of a batch"
                raise ValueError(f"{where} cannot be trained on: {error}") from None
        padding = self.processor.tokenizer.pad_token_id
        multiple = self.pad_to_multiple_of
        return {
            "input_ids": torch.tensor(pad([chat.input_ids for chat in encoded], padding, multiple_of=multiple)),
            "attention_mask": torch.tensor(pad([[1] * len(chat) for chat in encoded], 0, multiple_of=multiple)),
            "labels": torch.tensor(pad([chat.labels for chat in encoded], IGNORED, multiple_of=multiple)),
            **batch_of_videos,
        }

    def _encode_videos(self, videos: list[list]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """-> the model's inputs for raw videos, and for each row the tokens of each of its videos."""
        flat = [part for row in videos for part in row]
        if not flat:
            return {}, [[] for _ in videos]
        encoded = self.processor.video_processor(
            [part.video for part in flat],
            video_options=[part.options for part in flat],
            return_tensors="pt",
            **self.video_options,
        )
        frames = iter(encoded["num_frames"].tolist())
        counts = [[self.processor.num_video_tokens(next(frames)) for _ in row] for row in videos]
        return {name: encoded[name] for name in ("pixel_values_videos", "num_frames")}, counts

    def _encode_features(self, features: list[list[LongVLMVideoFeatures]]) -> tuple[dict[str, Any], list[list[int]]]:
        counts = [[self.processor.count_video_tokens(video)[0] for video in row] for row in features]
        joined = LongVLMVideoFeatures.cat(video for row in features for video in row)
        # A plain dict: pinning a batch's memory updates a copy of each mapping, which a ModelOutput refuses. Without
        # facts about the videos: the model does not need them, and not every device has their float64.
        needed = {"local_features": joined.local_features, "global_features": joined.global_features}
        return {"video_features": needed}, counts


__all__ = ["LongVLMDataCollator"]
