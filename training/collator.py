"""Chats with their videos, or features of them, become one batch for the model.

    collator = LongVLMDataCollator(processor, max_length=2048)
    batch = collator([{"messages": [...]}, ...])

Padding is on the right here (generation pads on the left). Videos are decoded here, in the workers of the data loader.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longvlm.training.chat_encoding import IGNORED, encode_chat, pad
from longvlm.training.formats import BadRow, as_messages, videos_in


class LongVLMDataCollator:
    """
    Also for TRL's `SFTTrainer`, which needs `SFTConfig(max_length=None, remove_unused_columns=False,
    dataset_kwargs={"skip_prepare_dataset": True})` beside `data_collator=` and `processing_class=processor`.

    Args:
        processor: a `LongVLMProcessor`.
        max_length: tokens of a chat at most, its videos' included.
        too_long: `"drop"`: a longer chat is an error here (`build_dataset` sorts them out beforehand); `"truncate"`:
            its end is cut, as in `encode_chat`.
        chat_template: instead of the processor's own.
        pad_to_multiple_of: lengths are rounded up to a multiple of it.
        video_options: of the video processor (`num_frames`, `fps`...).
    """

    def __init__(
        self,
        processor,
        *,
        max_length: int | None = None,
        too_long: str = "drop",
        chat_template: str | None = None,
        pad_to_multiple_of: int | None = None,
        video_options: Mapping[str, Any] | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.too_long = too_long
        self.chat_template = chat_template
        self.pad_to_multiple_of = pad_to_multiple_of
        self.video_options = dict(video_options or {})

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: rows of any form that `as_messages` knows. With `"video_features"`, a list of mappings with
                `local_features` `(L, d)` and `global_features` `(E, d)`, one for each place of a video, no video of
                the row is decoded.

        Returns:
            `input_ids`, `attention_mask`, `labels`: int64 `(batch, length)`; where there are videos also
            `pixel_values_videos` float32 `(videos, max_frames, 3, H, W)` and `num_frames` int64 `(videos,)`, or
            `video_features`.

        Raises:
            ValueError: a row cannot be trained on, or some have features and others videos.
        """
        chats = [
            as_messages(example) if "video_features" not in example else example["messages"] for example in examples
        ]
        features = [list(example.get("video_features") or []) for example in examples]
        videos = [[] if features[i] else videos_in(chat) for i, chat in enumerate(chats)]
        if any(features) and any(videos):
            raise ValueError("a batch has features of some videos and pixels of others; extract the features of all")
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
                        too_long=self.too_long,
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
        """-> what the model gets of raw videos, and the numbers of tokens of each row's videos."""
        flat = [video for row in videos for video in row]
        if not flat:
            return {}, [[] for _ in videos]
        encoded = self.processor.video_processor(flat, return_tensors="pt", **self.video_options)
        frames = iter(encoded["num_frames"].tolist())
        counts = [[self.processor.num_video_tokens(next(frames)) for _ in row] for row in videos]
        return {name: encoded[name] for name in ("pixel_values_videos", "num_frames")}, counts

    def _encode_features(self, features: list[list[Mapping]]) -> tuple[dict[str, Any], list[list[int]]]:
        flat = [one for row in features for one in row]
        counts = [[len(one["local_features"]) + self.processor.num_global_tokens for one in row] for row in features]
        video_features = {
            "local_features": tuple(one["local_features"] for one in flat),
            "global_features": torch.stack([one["global_features"] for one in flat]),
        }
        return {"video_features": video_features}, counts


__all__ = ["LongVLMDataCollator"]
