"""Storyline: a synthetic benchmark for long videos, with exact answers, determined by seeds.

    story = make_story(story_seed("train", 0))        # what happens
    frames = frames_at(story, middle_times(story, 100))   # (100, 64, 64, 3) uint8
    questions = make_questions(story)                  # with answers and choices
    write_benchmark("storyline", videos=True)          # a `datasets` dataset with a card

Needs numpy alone; `write_video` PyAV, `contact_sheet` Pillow, `build_dataset` datasets.
"""

from .dataset import build_dataset, write_benchmark
from .questions import KINDS, Question, chance_levels, make_questions
from .render import FrameTruth, Renderer, frame_times, frames_at, iter_frames, middle_times
from .story import (
    ACTIONS,
    COLOURS,
    SCENES,
    SHAPES,
    SIZES,
    SPLITS,
    Distractor,
    Event,
    Scene,
    Story,
    combinations_of,
    make_story,
    split_of_combination,
    split_of_seed,
    story_seed,
)
from .video import contact_sheet, write_video

__all__ = [
    "ACTIONS",
    "COLOURS",
    "KINDS",
    "SCENES",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Distractor",
    "Event",
    "FrameTruth",
    "Question",
    "Renderer",
    "Scene",
    "Story",
    "build_dataset",
    "chance_levels",
    "combinations_of",
    "contact_sheet",
    "frame_times",
    "frames_at",
    "iter_frames",
    "make_questions",
    "make_story",
    "middle_times",
    "split_of_combination",
    "split_of_seed",
    "story_seed",
    "write_benchmark",
    "write_video",
]
