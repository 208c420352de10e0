"""Stories as videos that are made when they are asked for, and their features."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from longvlm.conversion.feature_shards import FeatureReader
from longvlm.evaluation.storyline import frames_at, make_story, middle_times, story_seed
from longvlm.training.features import extract_features
from longvlm.training.tiny.vision import FRAME_SIZE


class StoryVideos(Mapping):
    """`"train/17/100"` -> the 18th story of split train as 100 frames `(100, 64, 64, 3)` uint8."""

    def __init__(self, split: str, indices: Sequence[int], num_frames: int):
        self.names = [video_name(split, index, num_frames) for index in indices]

    def __getitem__(self, name: str):
        split, index, num_frames = name.split("/")
        story = make_story(story_seed(split, int(index)))
        return frames_at(story, middle_times(story, int(num_frames)), size=FRAME_SIZE)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def video_name(split: str, index: int, num_frames: int) -> str:
    return f"{split}/{index}/{num_frames}"


def encode_stories(model, processor, folder: Path, videos: StoryVideos) -> FeatureReader:
    """The features of stories, kept in `folder`: what is there already is not made again.

    The encoder computes in bfloat16, as it does in the checkpoint.
    """
    dtype = model.dtype
    model.model.vision_tower.to(torch.bfloat16)
    try:
        extract_features(
            videos, folder, model=model, processor=processor, progress=True, video_options={"do_sample_frames": False}
        )
    finally:
        model.model.vision_tower.to(dtype)
    return FeatureReader(folder)
