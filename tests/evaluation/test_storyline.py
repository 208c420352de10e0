"""Storyline: a seed gives the same bytes; answers are true of the events and of the pixels; nothing is guessable.

Answers are derived here a second time, from the story's JSON and the question's words, by other code.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from longvlm import LongVLMVideoProcessor
from longvlm.evaluation import storyline
from longvlm.evaluation.storyline import blind, questions
from longvlm.evaluation.storyline.render import RGB
from longvlm.evaluation.storyline.story import MAX_COUNT
from longvlm.processing.video_decoding import decode_video
from tests.helpers.paths import ROOT

FINGERPRINT = """
import hashlib, sys
from longvlm.evaluation import storyline as s
digest = hashlib.sha256()
for split in s.SPLITS:
    story = s.make_story(s.story_seed(split, 7))
    digest.update(story.to_json().encode())
    digest.update(repr(s.make_questions(story, per_kind=2)).encode())
    digest.update(s.frames_at(story, s.middle_times(story, 12), size=64).tobytes())
print(digest.hexdigest())
"""


def stories(split, count, **options):
    return [storyline.make_story(storyline.story_seed(split, index), **options) for index in range(count)]


def story_with_action(action, index=0, **options):
    """A test story with an event of this action -> story, event."""
    found = [
        (story, event) for story in stories("test", 150, **options) for event in story.events if event.action == action
    ]
    return found[index]


# --- determinism and form ---


def test_a_seed_gives_the_same_bytes_twice_and_in_another_process(capsys):
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", FINGERPRINT]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for _ in range(2):
        exec(FINGERPRINT, {})
    assert capsys.readouterr().out == other * 2 and len(other.strip()) == 64


def test_a_story_stays_what_it_was():
    """Change this only together with the benchmark's version: published numbers refer to these stories."""
    texts = [story.to_json() for split in storyline.SPLITS for story in stories(split, 20)]
    asked = [question for split in storyline.SPLITS for question in blind.questions_of(split, 20)]
    digest = hashlib.sha256("\n".join([*texts, repr(asked)]).encode()).hexdigest()
    assert digest[:16] == "02715cc473e6945a"


def test_stories_survive_json_and_seeds_differ():
    made = stories("train", 50) + stories("test", 50)
    assert all(storyline.Story.from_json(story.to_json()) == story for story in made)
    assert len({story.events for story in made}) == 100


@pytest.mark.parametrize("duration", [10, 3600, 3 * 3600])
def test_events_follow_each_other_within_any_duration(duration):
    for story in stories("train", 40, duration=duration):
        times = [time for event in story.events for time in (event.start, event.end)]
        assert 0 < times[0] and times[-1] < duration and times == sorted(times)
        assert 4 <= len(story.events) <= 8
        assert min(b - a for a, b in zip(times[::2], times[1::2], strict=True)) > 0.055 * duration
        assert story.scenes[0].start == 0 and story.scenes[-1].end == duration
        assert all(a.end == b.start for a, b in pairwise(story.scenes))
        assert max(story.scene_shares().values()) > 0.6


def test_the_same_story_fits_any_duration():
    short, long = (storyline.make_story(storyline.story_seed("test", 3), duration=d) for d in (10, 10_000))
    assert [event.object for event in short.events] == [event.object for event in long.events]
    np.testing.assert_allclose(
        [event.start / 10 for event in short.events], [event.start / 10_000 for event in long.events], atol=1e-4
    )


def test_impossible_wishes_are_refused_in_one_line():
    story = stories("test", 1)[0]
    for call, words in [
        (lambda: storyline.story_seed("dev", 0), 'split "dev"'),
        (lambda: storyline.story_seed("train", 10**9), "index 1000000000"),
        (lambda: storyline.make_story(-1), "seed -1"),
        (lambda: storyline.make_story(0, duration=0), "duration=0"),
        (lambda: storyline.make_story(0, num_events=3), "num_events=3"),
        (lambda: storyline.make_questions(story, kinds=["why"]), '"why"'),
        (lambda: storyline.Renderer(story, 8), "size=8"),
        (lambda: storyline.write_video(story, "x.mp4", size=65), "size=65 is odd"),
        (lambda: storyline.iter_frames(story, fps=0), "fps=0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            call()
        assert "\n" not in str(error.value)


# --- splits ---


def test_no_combination_is_in_two_splits_and_every_pair_is_in_all():
    seen = {
        split: {(e.colour, e.shape, e.action) for story in stories(split, 400) for e in story.events}
        for split in storyline.SPLITS
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert [len(seen[split]) for split in storyline.SPLITS] == [300, 100, 100]  # all there are
    for fields in ((0, 1), (0, 2), (1, 2)):
        pairs = [{tuple(combination[f] for f in fields) for combination in seen[split]} for split in storyline.SPLITS]
        assert pairs[0] == pairs[1] == pairs[2]


def test_no_seed_is_in_two_splits():
    seeds = [storyline.story_seed(split, index) for split in storyline.SPLITS for index in (0, 5, 10**9 - 1)]
    assert len(set(seeds)) == 9
    assert [storyline.split_of_seed(seed) for seed in seeds] == [s for s in storyline.SPLITS for _ in range(3)]


def test_questions_of_a_split_never_name_a_combination_of_another():
    for split in ("train", "test"):
        for question in blind.questions_of(split, 300):
            if question.template.startswith("did it happen/event"):
                colour, shape, action = named(question.question)
                assert storyline.split_of_combination(colour, shape, action) == split


# --- answers, derived a second time ---


def named(text):
    """The colour, shape and action that a question's words name; `None` for each that is not named."""
    words = text.lower().rstrip("?")
    colour = next((c for c in storyline.COLOURS if re.search(rf"\b{c}\b", words)), None)
    shape = next((s for s in storyline.SHAPES if re.search(rf"\b{s}(es|s)?\b", words)), None)
    action = None
    for candidate in storyline.ACTIONS:
        verb, _, way = candidate.partition(" ")
        if re.search(rf"\b{verb}s? ?{way}\b" if way else rf"\b{verb}s?\b", words):
            action = candidate
    return colour, shape, action


def answer_again(story, question):
    """The answer by the question's words and the story as JSON. Asserts that what it refers to is unique."""
    told = json.loads(story.to_json())
    events = told["events"]
    colour, shape, action = named(question.question)
    wanted = {k: v for k, v in (("colour", colour), ("shape", shape), ("action", action)) if v}
    matching = [i for i, event in enumerate(events) if all(event[k] == v for k, v in wanted.items())]
    text = question.question.lower()

    def tell(i):
        event = events[i]
        if "action" in text or " do?" in text:
            return event["action"]
        if "colour" in text:
            return event["colour"]
        return event["shape"] if "shape" in text else f"{event['colour']} {event['shape']}"

    if question.kind in ("first", "last"):
        assert not wanted
        return tell(0 if "first" in text else -1)
    if question.kind == "scene":
        seconds = Counter()
        for scene in told["scenes"]:
            seconds[scene["kind"]] += scene["end"] - scene["start"]
        return seconds.most_common(1)[0][0]
    if question.kind == "how many":
        return questions.NUMBERS[len(matching)]  # of all, where nothing is named
    if question.kind == "did it happen":
        return "yes" if matching else "no"
    (only,) = matching  # nothing else is called so
    if question.kind in ("before", "after"):
        return tell(only - 1 if "before" in text else only + 1)
    if question.kind == "when":
        quarters = {int(4 * events[only][edge] / told["duration"]) for edge in ("start", "end")}
        (quarter,) = quarters
        return ("first", "second", "third", "fourth")[quarter]
    return events[only]["colour"] if question.kind == "what colour" else events[only]["action"]


@pytest.mark.parametrize("split", storyline.SPLITS)
def test_every_answer_follows_from_the_events(split):
    kinds = Counter()
    for story in stories(split, 150):
        asked = storyline.make_questions(story, per_kind=3)
        assert len({question.question for question in asked}) == len(asked)
        for question in asked:
            assert answer_again(story, question) == question.answer, question
            assert question.answer in question.choices and 1 <= len(question.answer.split()) <= 3
            kinds[question.kind] += 1
    assert set(kinds) == set(storyline.KINDS) and min(kinds.values()) > 80


def test_a_no_differs_from_what_happened_in_one_word():
    checked = 0
    for story in stories("test", 200):
        for question in storyline.make_questions(story, kinds=["did it happen"], per_kind=3):
            if question.answer == "no":
                asked = named(question.question)
                near = [
                    sum(a == b for a, b in zip(asked, (event.colour, event.shape, event.action), strict=True) if a)
                    for event in story.events
                ]
                assert max(near) == sum(word is not None for word in asked) - 1
                checked += 1
    assert checked > 100


# --- nothing can be guessed ---


@pytest.fixture(scope="module")
def asked():
    return {"train": blind.questions_of("train", 1200), "test": blind.questions_of("test", 1000)}


@pytest.mark.parametrize("guesser", blind.GUESSERS)
def test_reading_the_question_alone_is_no_better_than_chance(asked, guesser):
    guess = blind.GUESSERS[guesser](asked["train"])
    chance = storyline.chance_levels(asked["test"])
    accuracy = blind.accuracy_by_kind(guess, asked["test"])
    assert set(accuracy) == {*storyline.KINDS, "all"} and len(asked["test"]) > 9_000
    for kind, level in chance.items():
        # four standard deviations of 700 guesses (as many as the rarest kind has), and a point
        allowed = 0.01 + 4 * np.sqrt(level * (1 - level) / (len(asked["test"]) if kind == "all" else 700))
        assert accuracy[kind] < level + allowed, (kind, accuracy[kind], level)


def test_the_guessers_find_what_can_be_guessed():
    """Of questions whose words tell the answer they are right: so the test above would see a leak."""
    leaking = [
        questions.Question(f"is it {word}?", answer, "leak", "leak/0", ("no", "yes"))
        for word, answer in [("red", "yes"), ("blue", "no"), ("green", "yes"), ("white", "no")] * 20
    ]
    for name in ("lookup", "naive Bayes"):
        assert blind.accuracy_by_kind(blind.GUESSERS[name](leaking), leaking)["leak"] == 1


def test_the_chance_levels_in_the_documentation_are_those_of_the_code(asked):
    text = (ROOT / "docs" / "storyline.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| ")]
    written = {kind: (count, chance) for kind, count, chance in rows[1:]}
    times = Counter(question.kind for question in asked["test"]) + Counter({"all": len(asked["test"])})
    chances = storyline.chance_levels(asked["test"])
    assert written == {kind: (str(times[kind]), f"{100 * chances[kind]:.1f}") for kind in chances}


@pytest.mark.parametrize("kind", storyline.KINDS)
def test_answers_are_spread_evenly(asked, kind):
    """Chi-squared, per set of choices, below what chance would exceed once in about 100,000 times."""
    for choices in {q.choices for q in asked["train"] if q.kind == kind}:
        answers = Counter(q.answer for q in asked["train"] if q.kind == kind and q.choices == choices)
        expected = sum(answers.values()) / len(choices)
        free = len(choices) - 1
        chi = sum((answers[choice] - expected) ** 2 / expected for choice in choices)
        assert chi < free + 4.3 * np.sqrt(2 * free) + 12, (kind, answers)


def test_chance_is_one_of_the_choices_and_averaged_by_kind():
    pair = [questions.Question("", "a", "x", "t", tuple("abcd")), questions.Question("", "a", "x", "t", ("a", "b"))]
    assert storyline.chance_levels(pair) == {"x": (1 / 4 + 1 / 2) / 2, "all": (1 / 4 + 1 / 2) / 2}
    assert MAX_COUNT == 4


# --- pixels ---


def pixels_near(frame, colour, tolerance=24):
    return np.abs(frame.astype(int) - np.array(RGB[colour]) - 5).max(axis=2) <= tolerance


def test_objects_are_where_and_what_the_truth_says():
    for story in stories("test", 25):
        renderer = storyline.Renderer(story, 96)
        for number, event in enumerate(story.events):
            time = event.end - 0.01 if event.action == "appear" else event.start + 0.01
            frame, truth = renderer.frame_at(time), renderer.truth_at(time)
            assert (truth.event, truth.colour, truth.shape, truth.action) == (
                number,
                event.colour,
                event.shape,
                event.action,
            )
            near = pixels_near(frame, event.colour)
            assert truth.mask.sum() > 20
            # Pixels on the edge are mixed with the background: many of a small star's.
            assert (near & truth.mask).sum() > 0.6 * truth.mask.sum()
            assert (near & ~truth.mask).sum() < 0.1 * truth.mask.sum()
            rows, columns = np.nonzero(truth.mask)
            assert truth.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert abs(columns.mean() / 96 - truth.x) < 0.6 * truth.radius


def test_no_colour_of_an_object_is_in_the_background():
    for story in stories("train", 40):
        renderer = storyline.Renderer(story, 64)
        empty = [(a.end + b.start) / 2 for a, b in pairwise(story.events)]
        for time in empty:
            assert renderer.truth_at(time).event is None and not renderer.truth_at(time).visible
            frame = renderer.frame_at(time)
            assert max(pixels_near(frame, colour).mean() for colour in storyline.COLOURS) < 0.01


def test_first_and_last_colour_are_read_from_the_pixels():
    for story in stories("test", 12):
        frames = storyline.frames_at(story, storyline.middle_times(story, 100))
        shown = [[pixels_near(frame, colour).sum() for colour in storyline.COLOURS] for frame in frames]
        seen = [storyline.COLOURS[int(np.argmax(counts))] for counts in shown if max(counts) > 25]
        assert seen[0] == story.events[0].colour and seen[-1] == story.events[-1].colour


@pytest.mark.parametrize(
    ("action", "rule"),
    [
        ("move left", lambda a, b: a.x - b.x > 0.3 and a.y == b.y),
        ("move right", lambda a, b: b.x - a.x > 0.3 and a.y == b.y),
        ("move up", lambda a, b: a.y - b.y > 0.3 and a.x == b.x),
        ("move down", lambda a, b: b.y - a.y > 0.3 and a.x == b.x),
        ("grow", lambda a, b: b.mask.sum() > 3 * a.mask.sum()),
        ("shrink", lambda a, b: a.mask.sum() > 3 * b.mask.sum()),
        ("turn", lambda a, b: 170 < b.angle - a.angle < 181),
        ("appear", lambda a, b: not a.visible and b.opacity == 1),
        ("leave", lambda a, b: a.opacity == 1 and not b.visible),
    ],
)
def test_an_action_changes_what_its_name_says(action, rule):
    story, event = story_with_action(action)
    renderer = storyline.Renderer(story, 96)
    before, after = (renderer.truth_at(time) for time in (event.start + 0.01, event.end - 0.01))
    assert rule(before, after)
    if action.startswith("move"):  # and the pixels go with it
        boxes = [
            np.argwhere(pixels_near(renderer.frame_at(t.time), event.colour)).mean(axis=0) for t in (before, after)
        ]
        moved = (boxes[1] - boxes[0]) / 96
        assert np.allclose(moved, (after.y - before.y, after.x - before.x), atol=0.06)


def test_blinking_is_seen_in_six_frames_of_the_event():
    story, event = story_with_action("blink")
    renderer = storyline.Renderer(story, 64)
    times = [event.start + (i + 0.5) / 6 * (event.end - event.start) for i in range(6)]
    shown = [pixels_near(renderer.frame_at(time), event.colour).sum() > 15 for time in times]
    assert shown == [renderer.truth_at(time).visible for time in times]
    assert sum(a != b for a, b in pairwise(shown)) == 4


def test_a_frame_alone_is_the_frame_in_its_turn():
    story = storyline.make_story(storyline.story_seed("train", 4), duration=12)
    in_turn = list(storyline.iter_frames(story, fps=5, size=48))
    times = list(storyline.frame_times(story, 5))
    assert len(in_turn) == len(times) == 60
    for index in (47, 3, 0, 59):
        np.testing.assert_array_equal(storyline.frames_at(story, [times[index]], size=48)[0], in_turn[index])
    assert in_turn[0].dtype == np.uint8 and in_turn[0].shape == (48, 48, 3)
    assert len({frame.tobytes() for frame in in_turn}) == 60  # background and noise never stand still


def test_memory_does_not_grow_with_the_number_of_frames():
    def peak(frames):
        story = storyline.make_story(storyline.story_seed("train", 1), duration=3600)
        tracemalloc.start()
        for _ in storyline.iter_frames(story, fps=frames / 3600, size=64):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(50)
    assert peak(2000) < 1.1 * peak(200) < 3e6


# --- files ---


def test_the_file_shows_the_events_at_the_right_times(tmp_path):
    story = storyline.make_story(storyline.story_seed("test", 2), duration=20)
    path = storyline.write_video(story, tmp_path / "story.mp4", fps=10, size=96)
    assert [file.name for file in tmp_path.iterdir()] == ["story.mp4"]
    decoded = decode_video(path)
    assert decoded.metadata.total_num_frames == 200 and decoded.metadata.fps == 10
    np.testing.assert_allclose(decoded.metadata.timestamps, np.arange(200) / 10, atol=1e-3)
    renderer = storyline.Renderer(story, 96)
    for frame, time in list(zip(decoded.frames, decoded.metadata.timestamps, strict=True))[::7]:
        truth = renderer.truth_at(round(time, 4))
        error = np.abs(frame.astype(int) - renderer.frame_at(round(time, 4)).astype(int)).mean()
        assert error < 12
        if truth.visible and truth.opacity == 1:
            assert pixels_near(frame, truth.colour, 70)[truth.mask].mean() > 0.6

    again = storyline.write_video(story, tmp_path / "again.mp4", fps=10, size=96)
    for one, other in zip(decoded.frames, decode_video(again).frames, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 4


def test_the_video_processor_takes_frames_of_the_file_and_of_the_renderer_alike(tmp_path):
    story = storyline.make_story(storyline.story_seed("test", 5), duration=10)
    path = storyline.write_video(story, tmp_path / "story.mp4", fps=10, size=64)
    processor = LongVLMVideoProcessor(
        num_frames=20, size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    output = processor(str(path), return_metadata=True, return_tensors="pt")
    times = output["video_metadata"][0].timestamps
    expected = storyline.frames_at(story, [round(time, 4) for time in times])
    assert output["pixel_values_videos"].shape == (1, 20, 3, 64, 64)
    got = (output["pixel_values_videos"][0].permute(0, 2, 3, 1).numpy() * 0.5 + 0.5) * 255
    assert np.abs(got - expected).mean(axis=(1, 2, 3)).max() < 12


def test_the_contact_sheet_has_a_row_for_each_event(tmp_path):
    few, more, many = (
        storyline.contact_sheet(
            storyline.make_story(storyline.story_seed("train", 0), num_events=n), tmp_path / f"{n}.png", size=48
        )
        for n in (4, 6, 8)
    )
    assert many.height - more.height == more.height - few.height > 2 * 48
    with Image.open(tmp_path / "8.png") as image:
        assert image.size == many.size


# --- dataset ---


def test_the_dataset_has_a_row_for_each_question():
    dataset = storyline.build_dataset("validation", 12, duration=30)
    assert dataset.split == "validation" and set(dataset["split"]) == {"validation"}
    for row in dataset:
        story = storyline.Story.from_json(row["story"])
        assert story == storyline.make_story(row["seed"], duration=30)
        match = [q for q in storyline.make_questions(story) if q.question == row["question"]]
        assert [(q.answer, list(q.choices), q.chance) for q in match] == [
            (row["answer"], row["choices"], row["chance"])
        ]
    assert len(set(dataset["id"])) == len(dataset) > 100
    rest = storyline.build_dataset("validation", 4, first=8, duration=30)
    assert rest["question"][:] == dataset.filter(lambda row: row["seed"] in set(rest["seed"]))["question"][:]


def test_the_written_benchmark_loads_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, calls = tmp_path / "storyline", []
    options = {"num_stories": {"train": 3, "test": 2}, "videos": True, "duration": 10, "fps": 5, "size": 32}

    def stop(stage, done, total):
        calls.append((done, total))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storyline.write_benchmark(folder, progress=stop, **options)
    half = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert len([file for file in half if file.suffix == ".mp4"]) == 2
    storyline.write_benchmark(folder, **options)
    assert all(file.stat().st_mtime_ns == time for file, time in half.items())  # nothing is made twice

    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "test"}
    assert loaded["test"]["answer"][:] == storyline.build_dataset("test", 2, duration=10)["answer"][:]
    for split in loaded.values():
        assert all((folder / video).is_file() for video in split["video"])
    assert not [file for file in folder.rglob(".*") if file.is_file()]
    with pytest.raises(ValueError, match="contains a benchmark with fps=5, not 6"):
        storyline.write_benchmark(folder, **{**options, "fps": 6})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        storyline.write_benchmark(tmp_path / "other", **options)


def test_the_card_has_valid_metadata(tmp_path):
    from huggingface_hub import DatasetCard

    from longvlm.evaluation.storyline.dataset import card_text

    card = DatasetCard(card_text(["train", "test"]))
    assert card.data.license == "apache-2.0" and card.data.pretty_name == "Storyline"
    (config,) = card.data.to_dict()["configs"]
    assert [entry["split"] for entry in config["data_files"]] == ["train", "test"]
