"""Storyline as a `datasets` dataset: in memory, or as a folder that `datasets.load_dataset` reads.

One row is one question. Rows carry the whole story as JSON, so frames can be made where they are needed; videos are
written only on request. Writing can be killed at any moment and called again: each file appears under its name when it
is whole, and what is there already is not made again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longvlm.files import atomic_write, read_json_object

from .questions import KINDS, make_questions
from .story import NUM_EVENTS, SPLITS, Story, make_story, story_seed
from .video import write_video

NUM_STORIES = {"train": 2000, "validation": 200, "test": 500}
SETTINGS = "storyline.json"
VERSION = 1  # of what a seed gives; raise it when stories or questions change


def build_dataset(
    split: str,
    num_stories: int,
    *,
    first: int = 0,
    duration: float | None = None,
    num_events: int | tuple[int, int] = NUM_EVENTS,
    kinds: Sequence[str] = KINDS,
    per_kind: int = 1,
):
    """The questions about stories `first` to `first + num_stories - 1` of a split, as a `datasets.Dataset`.

    Columns: `id`, `video` (path within the folder that `write_benchmark` makes), `question`, `answer`, `kind`,
    `template`, `choices` (list), `chance`, `duration` (seconds), `seed`, `split`, `story` (JSON, for
    `Story.from_json`). Arguments as in `make_story` and `make_questions`.
    """
    datasets = _datasets()
    if num_stories < 1:
        raise ValueError(f"num_stories={num_stories} is too few; ask for 1 or more")
    rows = [
        row
        for story in _stories(split, num_stories, first, duration, num_events)
        for row in _rows(story, kinds, per_kind)
    ]
    text, real = datasets.Value("string"), datasets.Value("float64")
    features = {
        "id": text,
        "video": text,
        "question": text,
        "answer": text,
        "kind": text,
        "template": text,
        "choices": datasets.List(text),
        "chance": real,
        "duration": real,
        "seed": datasets.Value("int64"),
        "split": text,
        "story": text,
    }
    return datasets.Dataset.from_list(rows, features=datasets.Features(features), split=split)


def write_benchmark(
    folder,
    *,
    num_stories: Mapping[str, int] = NUM_STORIES,
    videos: bool | Sequence[str] = False,
    fps: float = 10,
    size: int = 64,
    duration: float | None = None,
    num_events: int | tuple[int, int] = NUM_EVENTS,
    kinds: Sequence[str] = KINDS,
    per_kind: int = 1,
    progress=None,
) -> Path:
    """Writes the benchmark: `data/SPLIT.parquet`, a card, and `videos/SPLIT/SEED.mp4` on request.

    Args:
        folder: a new or empty folder, or one that an earlier call with the same settings left unfinished.
        num_stories: split -> number of stories; splits can be left out.
        videos: write videos (H.264 with `fps` and `size`) for all splits (True), for none, or for those named.
        progress: called as `progress("videos", done, total)` after each video.

    Raises:
        ValueError: the folder contains a benchmark with other settings, or something else.
    """
    folder = Path(folder)
    unknown = [split for split in num_stories if split not in SPLITS]
    if unknown or not num_stories:
        raise ValueError(f"num_stories={dict(num_stories)} must name some of the splits {', '.join(SPLITS)}")
    named = (list(num_stories) if videos else []) if isinstance(videos, bool) else list(videos)
    if wrong := [split for split in named if split not in num_stories]:
        raise ValueError(f'videos of split "{wrong[0]}" are asked for, which num_stories does not contain')
    settings = {
        "version": VERSION,
        "num_stories": dict(num_stories),
        "fps": fps,
        "size": size,
        "duration": duration,
        "num_events": [num_events] * 2 if isinstance(num_events, int) else list(num_events),
        "kinds": list(kinds),
        "per_kind": per_kind,
    }
    _claim(folder, settings)
    for split, count in num_stories.items():
        target = folder / "data" / f"{split}.parquet"
        if not target.exists():
            rows = build_dataset(
                split, count, duration=duration, num_events=num_events, kinds=kinds, per_kind=per_kind
            )
            with atomic_write(target) as path:
                rows.to_parquet(path)
    done, total = 0, sum(num_stories[split] for split in named)
    for split in named:
        for story in _stories(split, num_stories[split], 0, duration, num_events):
            target = folder / _video_name(story)
            if not target.exists():
                write_video(story, target, fps=fps, size=size)
            done += 1
            if progress is not None:
                progress("videos", done, total)
    with atomic_write(folder / "README.md") as path:
        path.write_text(card_text(num_stories), encoding="utf-8")
    return folder


def card_text(splits: Mapping[str, int] | Sequence[str] = SPLITS) -> str:
    """The dataset card; its metadata tell `datasets` where these splits are."""
    text = (Path(__file__).parent / "dataset_card.md").read_text(encoding="utf-8")
    lines = text.split("\n")
    for split in SPLITS:
        if split not in splits:
            start = lines.index(f"  - split: {split}")
            del lines[start : start + 2]
    return "\n".join(lines)


def _stories(split, num_stories, first, duration, num_events) -> Iterator[Story]:
    for index in range(first, first + num_stories):
        yield make_story(story_seed(split, index), duration=duration, num_events=num_events)


def _rows(story: Story, kinds: Sequence[str], per_kind: int) -> Iterator[dict[str, Any]]:
    about = {
        "video": _video_name(story),
        "duration": story.duration,
        "seed": story.seed,
        "split": story.split,
        "story": story.to_json(),
    }
    for number, question in enumerate(make_questions(story, kinds=kinds, per_kind=per_kind)):
        fields = asdict(question)
        yield {
            "id": f"{story.seed}-{number}",
            **fields,
            "choices": list(question.choices),
            "chance": question.chance,
            **about,
        }


def _video_name(story: Story) -> str:
    return f"videos/{story.split}/{story.seed}.mp4"


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Marks the folder as this benchmark's, or checks that it is."""
    file = folder / SETTINGS
    if file.exists():
        there = read_json_object(file)
        for name in settings:
            if there.get(name) != settings[name]:
                raise ValueError(
                    f"{folder} contains a benchmark with {name}={there.get(name)}, not {settings[name]}; "
                    "choose another folder or the same settings"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a Storyline benchmark; choose a new folder")
    else:
        with atomic_write(file) as path:
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _datasets():
    try:
        import datasets
    except ImportError:
        raise ImportError("this needs datasets, which is not installed; run: pip install longvlm[train]") from None
    return datasets
