"""longvlm-tiny, as it comes with the package: how well it answers, on a fixed sample of Storyline's test split.

The floors lie below what its model card says of all stories, by more than such a sample varies.
"""

import json
import re

import pytest
from transformers import pipeline

import longvlm
from longvlm.evaluation import storyline
from longvlm.evaluation.storyline.scoring import answer_stories, score
from longvlm.publishing import text_problems, weight_problems
from recipes.tiny.build import measure
from recipes.tiny.card import card_text

FLOOR, FLOOR_LONG = 0.87, 0.78


@pytest.fixture(scope="module")
def tiny():
    return longvlm.load(longvlm.tiny_checkpoint())


@pytest.mark.slow
def test_answers_about_stories_it_never_saw(tiny):
    result = score(tiny, "test", 20, per_kind=2)
    assert result["count"] > 300
    assert result["accuracy"] > FLOOR, result
    assert result["unparsed"] < 0.02


def test_looks_at_the_video(tiny):
    """With another story's video it is hardly better than chance, which is 17 %."""
    assert score(tiny, "test", 12, video="swapped")["accuracy"] < 0.4


@pytest.mark.slow
def test_answers_about_a_thousand_frames(tiny):
    result = score(tiny, "test", 10, num_frames=1000)
    assert result["accuracy"] > FLOOR_LONG, result


def test_a_video_file_is_answered_as_its_frames_are(tiny, tmp_path):
    """Through the pipeline, from a compressed file of another size: most answers stay."""
    story = storyline.make_story(storyline.story_seed("test", 3), duration=30.0)
    file = tmp_path / "story.mp4"
    storyline.write_video(story, file, fps=10, size=192)
    pipe = pipeline("video-question-answering", model=longvlm.tiny_checkpoint())
    questions = storyline.make_questions(story)
    from_file = [pipe(video=str(file), question=question.question)["answer"] for question in questions]
    from_frames = [answer for _, answer in answer_stories(tiny, "test", 1, first=3)]
    same = sum(a == b for a, b in zip(from_file, from_frames, strict=True))
    assert same >= len(questions) - 2, list(zip(from_file, from_frames, strict=True))


def test_saved_again_it_brings_its_code(tiny, tmp_path):
    """The bundled one has none: the package is there. On the Hub it must."""
    folder = longvlm.tiny_checkpoint()
    assert not list(folder.glob("*.py"))
    model, processor = tiny.model, tiny.processor
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_longvlm.py").is_file()
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))


def test_scores_of_other_weights_are_not_taken(tmp_path):
    """Else a checkpoint that was trained again would carry the old one's numbers."""
    folder, file = longvlm.tiny_checkpoint(), tmp_path / "scores.json"
    assert measure(folder, file, {}) == {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**kept, "results": {"known": 1, "old": 2}}), encoding="utf-8")
    assert measure(folder, file, {"known": {}}) == {"known": 1}
    # What is missing is measured, and only that.
    results = measure(folder, file, {"known": {}, "blind": {"num_stories": 1, "num_frames": 10, "video": "none"}})
    assert results["known"] == 1 and results["blind"]["run"]["video"] == "none"
    file.write_text(json.dumps({"weights": "others", "results": {"known": 1}}), encoding="utf-8")
    assert measure(folder, file, {}) == {}


def test_the_card_is_what_the_recipe_makes_of_the_scores():
    folder = longvlm.tiny_checkpoint()
    scores, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("scores", "training"))
    assert (folder / "README.md").read_text(encoding="utf-8") == card_text(folder, scores, training)


def test_it_names_no_folder_of_the_machine_that_trained_it():
    files = {path.name: path for path in longvlm.tiny_checkpoint().iterdir()}
    assert text_problems(files) == [] and weight_problems(files) == []


def test_snippet_of_the_card_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    card = (longvlm.tiny_checkpoint() / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    question = storyline.make_questions(storyline.make_story(storyline.story_seed("test", 0), duration=20))[0]
    assert question.question == "Which colour does the object seen first have?"
    assert capsys.readouterr().out.startswith(f"{question.answer} ")


def test_card_tells_the_scores_that_were_measured():
    folder = longvlm.tiny_checkpoint()
    card = (folder / "README.md").read_text(encoding="utf-8")
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    for result in scores.values():
        assert f"**{100 * result['accuracy']:.1f}**" in card
        assert result["run"]["split"] == "test"
    # What was promised of the checkpoint.
    assert scores["100 frames"]["accuracy"] >= 0.90 and scores["1,000 frames"]["accuracy"] >= 0.75
    assert min(kind["accuracy"] for kind in scores["100 frames"]["kinds"].values()) >= 0.75
