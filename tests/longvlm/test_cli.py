"""The command `longvlm`: what goes to stdout and stderr, exit codes, one line per error, no torch for help."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from longvlm_cli import app as cli
from tests.helpers import video_files
from tests.helpers.tiny_models import save_tiny_llm, save_tiny_longvlm, tiny_longvlm
from tests.helpers.video_files import write_video
from tests.helpers.web_server import serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_longvlm(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "square.mp4", 24, rate=8)


SHORT = ("--max-new-tokens", "6")


def test_answer_goes_to_stdout_and_progress_to_stderr(run_command, checkpoint, video):
    code, out, err = run_command("ask", video, "What moves?", "--model", checkpoint, *SHORT)
    assert code == 0
    assert out.strip() and "decoding" not in out and out.count("\n") >= 1
    assert "decoding" in err and "encoding" in err and "8/8" in err
    assert "warning" not in err


def test_same_answer_as_the_pipeline(run_command, checkpoint, video):
    from transformers import pipeline

    expected = pipeline("video-question-answering", model=checkpoint)(
        video=video, question="What moves?", max_new_tokens=6, do_sample=False
    )
    _, out, _ = run_command("ask", video, "What moves?", "--model", checkpoint, *SHORT)
    assert out == expected["answer"] + "\n"


def test_json_is_one_object_a_line_and_the_video_is_encoded_once(run_command, checkpoint, video):
    code, out, err = run_command("ask", video, "Who?", "Where?", "--model", checkpoint, "--json", *SHORT)
    first, second = map(json.loads, out.splitlines())
    assert code == 0
    assert (first["question"], second["question"]) == ("Who?", "Where?")
    assert first["video"] == video and isinstance(first["answer"], str) and first["seconds"] > 0
    assert first["frames"] == 8 and "frames" not in second
    assert err.count("decoding:   0%") == err.count("encoding:   0%") == 1


def test_a_video_on_the_web_is_downloaded_once_with_progress_and_limits(run_command, checkpoint, video, tmp_path):
    content = Path(video).read_bytes()

    def without_length(answer):
        answer.head({})
        answer.wfile.write(content)

    with serve({"/film.mp4": lambda answer: answer.send(content), "/unknown": without_length}) as server:
        url = server.url + "/film.mp4"
        code, out, err = run_command("ask", url, "Who?", "Where?", "--model", checkpoint, "--json", *SHORT)
        assert code == 0 and json.loads(out.splitlines()[0])["video"] == url
        assert server.asked == ["/film.mp4"] and "downloading: 100%" in err
        code, out, err = run_command("ask", server.url + "/unknown", "Who?", "--model", checkpoint, *SHORT)
        assert code == 0 and err.count("downloading") <= 1
        picture = tmp_path / "merged.png"
        assert run_command("inspect", url, "--model", checkpoint, "--out", picture)[0] == 0 and picture.exists()
        for command in (("ask", url, "Who?", "--quiet"), ("inspect", url, "--out", picture)):
            code, out, err = run_command(*command, "--model", checkpoint, "--max-download-bytes", "100")
            assert (code, out) == (2, "")
            assert "bytes are more than the limit of 100; raise --max-download-bytes or" in err.splitlines()[-1]
            code, out, err = run_command(*command, "--model", checkpoint, "--max-download-seconds", "-1")
            assert code == 2 and "--max-download-seconds -1.0: must be a number above 0" in err


def test_a_pipe_is_read_once_for_all_questions(run_command, checkpoint, video, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(Path(video).read_bytes()))
    writer.start()
    code, out, err = run_command("ask", pipe, "Who?", "Where?", "--model", checkpoint, "--quiet", *SHORT)
    writer.join()
    assert (code, out.count("\n"), err) == (0, 2, "")


def test_dash_reads_questions_from_stdin(run_command, checkpoint, video):
    _, expected, _ = run_command("ask", video, "Who?", "Where?", "--model", checkpoint, "--json", *SHORT)
    _, out, _ = run_command("ask", video, "-", "--model", checkpoint, "--json", *SHORT, stdin="Who?\n\n  Where?  \n")
    assert [json.loads(line)["answer"] for line in out.splitlines()] == [
        json.loads(line)["answer"] for line in expected.splitlines()
    ]


def test_streamed_answer_is_the_same(run_command, checkpoint, video):
    _, whole, _ = run_command("ask", video, "Who?", "--model", checkpoint, *SHORT)
    _, streamed, _ = run_command("ask", video, "Who?", "--model", checkpoint, "--stream", *SHORT)
    assert streamed.strip() == whole.strip()


def test_options_reach_the_video_and_the_generation(run_command, checkpoint, video):
    def ask(*options):
        return json.loads(run_command("ask", video, "Who?", "--model", checkpoint, "--json", *options)[1])

    assert ask("--num-frames", 3, *SHORT)["frames"] == 3
    assert ask("--fps", 2, *SHORT)["frames"] == 6  # 24 frames at 8 a second
    assert ask("--fps", 2, "--max-frames", 4, *SHORT)["frames"] == 4
    hot = ("--temperature", 5.0, "--top-p", 0.99, "--max-new-tokens", 12)
    sampled = [ask(*hot, "--seed", seed)["answer"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_window_of_the_video_is_asked_about_and_drawn(run_command, checkpoint, video, tmp_path):
    def ask(*options):
        return run_command("ask", video, "Who?", "--model", checkpoint, "--json", "--fps", 4, *options, *SHORT)

    assert json.loads(ask("--video-start", 1, "--video-end", 2.5)[1])["frames"] == 6  # of 3 seconds
    code, out, err = ask("--video-start", 3)
    assert (code, out) == (2, "") and "--video-start 3 is past the end of the video" in err
    code, out, err = ask("--video-start", 2, "--video-end", 1)
    assert (code, out) == (2, "") and "--video-start 2 must be before --video-end 1" in err
    window = ("--fps", 8, "--video-start", 1, "--video-end", 1.5, "--model", checkpoint)
    code, _, err = run_command("inspect", video, "--out", tmp_path / "merged.png", *window)
    assert code == 0 and "4 frames, 1 segments" in err


def test_quiet_says_nothing(run_command, checkpoint, video):
    code, out, err = run_command("ask", video, "Who?", "--model", checkpoint, "--quiet", *SHORT)
    assert (code, err) == (0, "") and out


def test_truncated_video_is_one_warning(run_command, checkpoint, tmp_path):
    short = Path(video_files.write_video(tmp_path / "cut.mkv", 250))
    code, _, err = run_command("ask", short, "Who?", "--model", checkpoint, "--quiet", *SHORT)
    assert (code, err) == (0, "")
    data = short.read_bytes()
    short.write_bytes(data[: len(data) // 2])
    code, out, err = run_command("ask", short, "Who?", "And who?", "--model", checkpoint, "--quiet", *SHORT)
    assert code == 0 and out
    assert err.count("\n") == 1 and err.startswith("longvlm: warning: ") and "cut.mkv" in err and " left" in err


def test_untrained_parts_are_told(run_command, video, tmp_path):
    save_tiny_longvlm(tmp_path, untrained_parts=["multi_modal_projector"])
    code, _, err = run_command("ask", video, "Who?", "--model", tmp_path, "--quiet", *SHORT)
    assert code == 0
    assert err.splitlines() == [
        "longvlm: warning: untrained: multi modal projector. The answers say nothing about the video."
    ]


def test_model_that_gives_nan_is_an_error(run_command, video, tmp_path):
    model, processor = tiny_longvlm()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code, out, err = run_command("ask", video, "Who?", "--model", tmp_path, "--quiet", *SHORT)
    assert (code, out) == (2, "")
    assert "NaN" in err and "--dtype float32" in err and err.count("\n") == 1


def test_model_that_repeats_one_token_is_noticed(run_command, video, tmp_path):
    model, processor = tiny_longvlm()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, _, err = run_command("ask", video, "Who?", "--model", tmp_path, "--quiet", "--max-new-tokens", 20)
    assert "one token repeated" in err and err.count("\n") == 1


@pytest.fixture
def bundled(monkeypatch, checkpoint):
    """Another checkpoint in the place of longvlm-tiny: what is promised here holds for any."""
    monkeypatch.delenv("LONGVLM_MODEL", raising=False)
    monkeypatch.setattr("longvlm.bundled._FOLDER", Path(checkpoint))


def test_without_a_model_the_bundled_one_answers_and_a_line_says_what_it_knows(
    run_command, bundled, checkpoint, video
):
    _, expected, _ = run_command("ask", video, "Who?", "Where?", "--model", checkpoint, "--quiet", *SHORT)
    code, out, err = run_command("ask", video, "Who?", "Where?", *SHORT)
    assert (code, out) == (0, expected)
    said = [line for line in err.splitlines() if line.startswith(("longvlm:", "loading"))]
    assert len(said) == 1 and "longvlm-tiny" in said[0] and "synthetic Storyline" in said[0] and "--model" in said[0]
    # A warning, not progress: --quiet leaves it, and nothing else.
    assert run_command("ask", video, "Who?", "Where?", "--quiet", *SHORT) == (0, expected, said[0] + "\n")


def test_a_model_that_is_named_is_not_warned_of(run_command, bundled, checkpoint, video, monkeypatch):
    assert "longvlm-tiny" not in run_command("ask", video, "Who?", "--model", checkpoint, *SHORT)[2]
    monkeypatch.setenv("LONGVLM_MODEL", checkpoint)
    assert "longvlm-tiny" not in run_command("ask", video, "Who?", *SHORT)[2]


def test_inspect_without_a_model_takes_the_bundled_one(run_command, bundled, video, tmp_path):
    code, out, err = run_command("inspect", video, "--out", tmp_path / "tokens.png")
    assert code == 0 and out == f"{tmp_path / 'tokens.png'}\n" and (tmp_path / "tokens.png").stat().st_size > 1000
    assert [line for line in err.splitlines() if "longvlm-tiny" in line] == [err.splitlines()[0]]


@pytest.mark.parametrize("left", [(), ("config.json",), ("model.safetensors",)], ids=str)
def test_an_installation_without_the_bundled_model_says_what_to_do(
    run_command, bundled, video, tmp_path, monkeypatch, left
):
    for name in left:
        (tmp_path / name).touch()
    monkeypatch.setattr("longvlm.bundled._FOLDER", tmp_path)
    code, out, err = run_command("ask", video, "Who?")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("longvlm: error: longvlm-tiny") and str(tmp_path) in err
    assert "install longvlm again" in err and "another model" in err


@pytest.fixture
def bad(tmp_path, checkpoint, video):
    """What stands for the words in capitals in the cases below."""
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "no_pictures").mkdir()
    save_tiny_llm(tmp_path / "llm")
    return {"VIDEO": video, "MODEL": checkpoint, "TMP": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("ask TMP/missing.mp4 Who? --model MODEL", "missing.mp4"),
        ("ask TMP/text.mp4 Who? --model MODEL", "text.mp4"),
        ("ask TMP/empty.mp4 Who? --model MODEL", "empty.mp4"),
        ("ask TMP/no_pictures Who? --model MODEL", "no_pictures"),
        ("ask VIDEO Who? --model TMP/nothing", "nothing"),
        ("ask VIDEO Who? --model TMP/no_pictures", "config.json"),
        ("ask VIDEO Who? --model TMP/llm", "llama"),
        ("ask VIDEO Who? --model MODEL/model.safetensors", "is a file"),
        ("ask VIDEO - --model MODEL", "no question"),
        ("ask VIDEO --model MODEL", "QUESTION"),
        ("ask VIDEO Who? EMPTY --model MODEL", "QUESTION...: one of them is empty"),
        ("ask VIDEO BLANK --model MODEL", "question is empty"),
        ("ask VIDEO Who? --model MODEL --dtype float7", "float7"),
        ("ask VIDEO Who? --model MODEL --device moon", "moon"),
        ("ask VIDEO Who? --model MODEL --num-frames 0", "--num-frames"),
        ("ask VIDEO Who? --model MODEL --num-frames 4 --fps 1", "exclude each other"),
        ("ask VIDEO Who? --model MODEL --max-frames 4", "needs --fps"),
        ("ask VIDEO Who? --model MODEL --json --stream", "exclude each other"),
        ("ask VIDEO Who? --model MODEL --top-p 0.5", "--temperature"),
        ("ask VIDEO Who? --model MODEL --max-new-tokens 0", "--max-new-tokens"),
        (
            "ask VIDEO Who? --model MODEL --max-new-tokens 4000",
            "takes 2,048 in all: shorten the text or lower --max-new",
        ),
        ("ask VIDEO Who? --model MODEL --seed -1", "--seed"),
        ("ask VIDEO Who? --model MODEL --load-in-4bit --load-in-8bit", "--load-in-8bit exclude each other"),
        ("ask VIDEO Who? --model MODEL --colour", "--colour"),
        ("extract VIDEO --out TMP/features --fps 1 --num-frames 3", "exclude each other"),
        ("publish --repo-id me/it", "DIR"),
        ("assemble --language TMP/llm --out TMP/out", "vision"),
        ("assemble --language TMP/nothing.gguf --vision-config TMP/v.json --out TMP/out", "nothing.gguf"),
        ("assemble --language TMP/llm --vision TMP/llm --out TMP/out", "not a vision encoder"),
        ("assemble --language TMP/llm --vision TMP/llm --out TMP/llm", "--overwrite"),
        ("assemble --language TMP/llm --vision TMP/llm --out TMP/out --merge-schedule 4,x", "4,x"),
        ("assemble --language TMP/llm --vision TMP/llm --out TMP/out --merge-order up", "matching"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_exit_code_2(run_command, bad, arguments, says):
    for word, value in bad.items():
        arguments = arguments.replace(word, value)
    words = [{"EMPTY": " ", "BLANK": "\u200b"}.get(word, word) for word in arguments.split()]
    code, out, err = run_command(*words, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("longvlm: error: ") and err.count("\n") == 1, err
    assert says in err, err


def test_a_fault_of_the_program_shows_where_it_is(run_command, checkpoint, video, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr("longvlm_cli.ask.answer_questions", fault)
    monkeypatch.setattr(sys, "argv", ["longvlm", "ask", video, "Who?", "--model", checkpoint])
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main()


def test_convert_leaves_the_process_as_it_was(run_command, tmp_path):
    """A handler that stayed kept forks of the process from ending on SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    assert (
        run_command("convert", "original", "--llm", tmp_path, "--vision", tmp_path, "--out", tmp_path / "out")[0] == 2
    )
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_needs_neither_torch_nor_transformers():
    for arguments in (["--help"], ["ask", "--help"], ["assemble", "--help"], ["--version"]):
        command = [sys.executable, "-X", "importtime", "-m", "longvlm_cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
        assert "longvlm_cli.app" in imported and not imported & {"torch", "transformers", "numpy"}
        assert "longvlm" in done.stdout


def test_runs_as_a_module_in_a_process_of_its_own(checkpoint, video):
    command = [sys.executable, "-m", "longvlm", "ask", video, "Who?", "--model", checkpoint, "--json", *SHORT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 8
