"""Stories as videos that are made when they are asked for, and their features."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from longvlm.evaluation.storyline import Story, frames_at, make_story, middle_times, story_seed
from longvlm.features.extract import extract_features
from longvlm.features.store import FeatureReader
from recipes.progress import ProgressBar
from recipes.tiny.pieces import piece_of
from recipes.tiny.vision import FRAME_SIZE


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


def video_name(split: str, index: int, num_frames: int, piece: tuple[int, int] | None = None) -> str:
    """`"train/17/100"`; of a piece, the frames 20 to 39 of these: `"train/17/100/20-40"`."""
    return f"{split}/{index}/{num_frames}" + (f"/{piece[0]}-{piece[1]}" if piece else "")


def story_of(name: str) -> tuple[Story, int]:
    """-> the story of the video with this name, and the number of its frames."""
    split, index, num_frames, *piece = name.split("/")
    story = make_story(story_seed(split, int(index)))
    if not piece:
        return story, int(num_frames)
    first, end = map(int, piece[0].split("-"))
    return piece_of(story, int(num_frames), first, end), end - first


def encode_stories(model, processor, folder: Path, videos: StoryVideos) -> FeatureReader:
    """The features of stories, kept in `folder`: what is there already is not made again.

    The encoder computes in bfloat16, as it does in the checkpoint.
    """
    dtype = model.dtype
    model.model.vision_tower.to(torch.bfloat16)
    try:
        extract_features(
            videos,
            folder,
            model=model,
            processor=processor,
            progress=ProgressBar("video"),
            video_options={"do_sample_frames": False},
        )
    finally:
        model.model.vision_tower.to(dtype)
    return FeatureReader(folder)
