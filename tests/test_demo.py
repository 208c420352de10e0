"""`make demo`: every answer is shown next to the truth, right or wrong, and what it made is there to look at.

Another small checkpoint stands in the place of longvlm-tiny, so that this holds whatever that one has learned.
"""

from pathlib import Path

import av
import pytest
from PIL import Image

from examples import demo
from longvlm.evaluation import storyline
from tests.helpers.tiny_models import save_tiny_longvlm

STORY = 4
QUESTIONS = storyline.make_questions(storyline.make_story(storyline.story_seed("test", STORY), duration=10))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, checkpoint):
    """Runs the demo about ten seconds of story in `tmp_path`; returns what it printed."""
    monkeypatch.setattr("longvlm.bundled._FOLDER", checkpoint)
    monkeypatch.chdir(tmp_path)

    def run(*options):
        demo.main(["--duration", "10", *options])
        return capsys.readouterr().out

    return run


def test_a_video_and_two_pictures_are_left_and_named(run, tmp_path):
    printed = run("--story", "7")
    assert {file.name for file in (tmp_path / "demo").iterdir()} == {
        "story-7.mp4",
        "story-7.png",
        "story-7-tokens.png",
    }
    for file in (tmp_path / "demo").iterdir():
        assert f"  demo/{file.name}" in printed
    with av.open(str(tmp_path / "demo" / "story-7.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 256, 256)
        assert sum(1 for _ in video.decode(stream)) == 100
    for name in ("story-7.png", "story-7-tokens.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300


def test_every_answer_is_shown_with_the_truth_and_marked(run, monkeypatch):
    """Every other answer is the right one."""
    real, number = demo.ask, iter(range(100))

    def ask(pipe, video, question):
        answer, *seconds = real(pipe, video, question)
        at = next(number)
        assert question == QUESTIONS[at].question and isinstance(answer, str)
        wrong = next(choice for choice in QUESTIONS[at].choices if choice != QUESTIONS[at].answer)
        return QUESTIONS[at].answer if at % 2 else wrong, *seconds

    monkeypatch.setattr(demo, "ask", ask)
    printed = run()
    lines = [line for line in printed.splitlines() if any(q.question in line for q in QUESTIONS)]
    assert len(QUESTIONS) == len(storyline.KINDS)
    for at, (line, question) in enumerate(zip(lines, QUESTIONS, strict=True)):
        assert line.startswith(f"  {question.kind} ")
        assert line.split()[-2] == ("right" if at % 2 else "WRONG")
        assert question.answer in line.split(question.question)[1]
    assert f"\n{len(QUESTIONS) // 2} of {len(QUESTIONS)} answers are right" in printed


def test_the_video_is_decoded_and_encoded_once(run, monkeypatch):
    real, seconds = demo.ask, []

    def ask(*arguments):
        seconds.append(real(*arguments)[1:])
        return "", *seconds[-1]

    monkeypatch.setattr(demo, "ask", ask)
    printed = run()
    assert len(seconds) == len(QUESTIONS)
    assert seconds[0][0] > 0 and all(encoding == 0 and answering > 0 for encoding, answering in seconds[1:])
    assert printed.count("(none)") == len(QUESTIONS) and "\n0 of " in printed


def test_what_it_is_and_what_to_try_next_is_said(run):
    printed = run()
    assert "knows this synthetic world only" in printed
    assert "longvlm ask demo/story-4.mp4 'What is the last object?'" in printed
    readme = (Path(demo.__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert 'README.md, section "Ask about your own video"' in printed and "\n## Ask about your own video\n" in readme


@pytest.mark.parametrize("options", [("--duration", "0.5"), ("--story", "-1")], ids=str)
def test_what_cannot_be_is_one_line(run, options):
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert str(ended.value).startswith("demo: error: ") and "\n" not in str(ended.value)
    assert not Path("demo").exists()
