"""`longvlm extract`: every video once, whatever is broken or killed; features that do not fit are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from longvlm.features.extract import extract_features
from longvlm.features.failures import FAILED, FailureLog, read_failed, write_failed
from longvlm.features.fingerprint import check_features, feature_metadata
from longvlm.features.store import FeatureReader, FeatureWriter
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm
from tests.helpers.video_files import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for number in range(4):
        write_video(folder / f"v_{number}.mp4", 10 + 3 * number)
    write_video(folder / "more" / "v_0.avi", 5, codec="mpeg4")
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder


NAMES = {"v_0", "v_1", "v_2", "v_3", "more/v_0"}


def check_whole(folder, model, processor, videos):
    """Every readable video is there once, as the model encodes it; the broken one is told."""
    reader = FeatureReader(folder)
    assert set(reader) == NAMES
    stored = [name for shard in folder.glob("*.safetensors") for name in names_in(shard)]
    assert sorted(stored) == sorted(NAMES)
    for name in NAMES:
        file = next(videos.glob(f"{name}.*"))
        inputs = processor.video_processor(str(file), return_tensors="pt")
        with torch.no_grad():
            expected = model.get_video_features(**{k: inputs[k] for k in ("pixel_values_videos", "num_frames")})
        torch.testing.assert_close(reader[name].local_features, expected.local_features[0])
        torch.testing.assert_close(reader[name].global_features, expected.global_features[0])
    failed = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    assert [one["video"] for one in failed] == ["broken"] and failed[0]["reason"]
    # Nothing of the work in between is left.
    left = {file.name for file in folder.rglob("*") if file.suffix != ".safetensors"}
    assert left - {".lock"} == {"index.json", "failed.jsonl"}


def names_in(shard):
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as opened:
        return [key.removesuffix("/local") for key in opened.keys() if key.endswith("/local")]


def test_a_broken_video_does_not_stop_the_rest(videos, tmp_path):
    model, processor = tiny_longvlm()
    report = extract_features([videos], tmp_path, model=model, processor=processor, shard_bytes=5000)
    assert (report.encoded, report.there_before, report.failed) == (5, 0, 1)
    check_whole(tmp_path, model, processor, videos)
    again = extract_features([videos], tmp_path, model=model, processor=processor)
    assert (again.encoded, again.there_before, again.failed) == (0, 5, 1)
    check_whole(tmp_path, model, processor, videos)


def test_parts_of_a_video_are_stored_next_to_the_whole(videos, tmp_path):
    model, processor = tiny_longvlm()
    sources = [videos / "v_2.mp4", videos / "v_3.mp4"]  # 16 and 19 frames, 25 a second
    windows = {"@0.2-0.4": {"video_start": 0.2, "video_end": 0.4}, "@0.32-": {"video_start": 0.32}, "": {}}
    windows["@0-0.2"] = {"video_end": 0.2}
    for window in windows.values():
        report = extract_features(sources, tmp_path, model=model, processor=processor, video_options=window)
        assert (report.encoded, report.there_before) == (2, 0)
        again = extract_features(sources, tmp_path, model=model, processor=processor, video_options=window)
        assert (again.encoded, again.there_before) == (0, 2)
    reader = FeatureReader(tmp_path)
    assert set(reader) == {f"{source.stem}{window}" for source in sources for window in windows}
    for window, options in windows.items():
        inputs = processor.video_processor(str(sources[0]), return_tensors="pt", **options)
        with torch.no_grad():
            expected = model.get_video_features(**inputs)
        torch.testing.assert_close(reader[f"v_2{window}"].local_features, expected.local_features[0])
    late = {"video_start": 0.7}  # only the longer one has frames there
    report = extract_features(sources, tmp_path, model=model, processor=processor, video_options=late)
    assert (report.encoded, report.failed) == (1, 1)
    assert "`video_start` 0.7 is past the end" in read_failed(tmp_path)["v_2@0.7-"]
    with pytest.raises(ValueError, match="`max_frames` 3 needs `fps`"):  # not the fault of each video
        extract_features(sources, tmp_path, model=model, processor=processor, video_options={"max_frames": 3})


def test_a_full_disk_is_not_blamed_on_a_video(videos, tmp_path, monkeypatch):
    model, processor = tiny_longvlm()

    def flush(self):
        monkeypatch.undo()  # once: at the end of the run there is space again
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureWriter, "flush", flush)
    with pytest.raises(OSError, match="No space left"):
        extract_features([videos], tmp_path, model=model, processor=processor, shard_bytes=1)
    report = extract_features([videos], tmp_path, model=model, processor=processor)
    assert (report.encoded + report.there_before, report.failed) == (5, 1)
    check_whole(tmp_path, model, processor, videos)


def test_a_repaired_video_is_encoded_by_the_next_run(videos, tmp_path):
    model, processor = tiny_longvlm()
    (tmp_path / "v.mp4").write_bytes(b"still downloading")
    report = extract_features([tmp_path], tmp_path / "out", model=model, processor=processor)
    assert report.failed == 1 and (tmp_path / "out" / "failed.jsonl").exists()
    write_video(tmp_path / "v.mp4", 24, rate=8)
    report = extract_features([tmp_path], tmp_path / "out", model=model, processor=processor)
    assert report.encoded == 1 and not (tmp_path / "out" / "failed.jsonl").exists()


@pytest.mark.slow
def test_killed_at_any_moment_no_video_is_lost_doubled_or_half_written(videos, tmp_path):
    """A run dies after each number of videos in turn, by the hardest way there is, between any two of its steps."""
    model, processor = tiny_longvlm()
    script = """
import os, sys
import longvlm.features.store as shards, longvlm.features.extract as features
from tests.helpers.tiny_models import tiny_longvlm
model, processor = tiny_longvlm()
left = int(sys.argv[3])
real = os.replace
def replace(source, target):
    # Every file gets its name by this call: die before one of them.
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    real(source, target)
os.replace = replace
features.extract_features([sys.argv[1]], sys.argv[2], model=model, processor=processor, shard_bytes=1)
"""
    for lives in (2, 6, 9):
        done = subprocess.run([sys.executable, "-c", script, videos, tmp_path, str(lives)], cwd=ROOT, env=os.environ)
        assert done.returncode == -signal.SIGKILL
    report = extract_features([videos], tmp_path, model=model, processor=processor)
    assert report.there_before > 0 and report.there_before + report.encoded == 5
    check_whole(tmp_path, model, processor, videos)


def test_features_of_another_model_or_other_frames_are_refused(videos, tmp_path):
    model, processor = tiny_longvlm()
    extract_features([videos / "v_0.mp4"], tmp_path, model=model, processor=processor)
    reader = FeatureReader(tmp_path)
    metadata = feature_metadata(model, processor.video_processor)
    check_features(reader, metadata, 2)
    # A bfloat16 copy is the same encoder.
    check_features(reader, feature_metadata(tiny_longvlm()[0].bfloat16(), processor.video_processor), 2)
    others = {
        "encoder_weights": feature_metadata(tiny_longvlm(seed=1)[0], processor.video_processor),
        "tokens_per_segment is 6 and not 5": feature_metadata(
            tiny_longvlm(tokens_per_segment=5)[0], processor.video_processor
        ),
        "num_frames is 8 and not 4": feature_metadata(model, processor.video_processor, {"num_frames": 4}),
        "fps is None and not 2.0": feature_metadata(model, processor.video_processor, {"fps": 2.0}),
    }
    for difference, other in others.items():
        with pytest.raises(ValueError, match=difference):
            check_features(reader, other, 2)
        with pytest.raises(ValueError, match="made in another way"):
            changed = {"num_frames": 4} if "num_frames" in difference else None
            other_model = tiny_longvlm(seed=1)[0] if changed is None else model
            extract_features([videos], tmp_path, model=other_model, processor=processor, video_options=changed)


def test_two_videos_of_one_name_are_an_error(videos, tmp_path):
    model, processor = tiny_longvlm()
    sources = [videos / "v_0.mp4", videos / "more" / "v_0.avi"]
    with pytest.raises(ValueError, match='would both be called "v_0"'):
        extract_features(sources, tmp_path, model=model, processor=processor)


def test_a_model_without_global_tokens_stores_none_and_reads_those_of_others(videos, tmp_path):
    model, processor = tiny_longvlm(global_placement="none")
    report = extract_features([videos], tmp_path / "none", model=model, processor=processor)
    assert (report.encoded, report.failed) == (5, 1)
    check_whole(tmp_path / "none", model, processor, videos)
    reader = FeatureReader(tmp_path / "none")
    assert reader.num_global_layers == 0 and reader["v_0"].global_features.shape == (0, 64)
    extract_features([videos], tmp_path / "two", model=tiny_longvlm()[0], processor=processor)
    metadata = feature_metadata(model, processor.video_processor)
    for folder in ("none", "two"):
        reader = FeatureReader(tmp_path / folder, num_global_layers=model.config.num_global_tokens)
        check_features(reader, metadata, model.config.num_global_tokens)
        features = reader["v_3"].as_video_features()
        assert processor.count_video_tokens(features) == features.num_tokens(model.config) == [12]
        assert features.global_features.shape == (1, 0, 64)
        inputs = processor("<video>\nWho?", video_features=features, return_tensors="pt")
        assert model(**inputs, video_features=features).logits.isfinite().all()
    # A model that needs global features cannot use a folder without them.
    with pytest.raises(ValueError, match="have 0 global layers, the model 2; extract them again"):
        FeatureReader(tmp_path / "none", num_global_layers=2)
    with pytest.raises(ValueError, match="num_global_layers is 0 and not 2"):
        check_features(FeatureReader(tmp_path / "none"), metadata, 2)


def test_the_last_global_features_are_given_where_more_are_stored(tmp_path):
    stored = torch.arange(12.0).view(3, 4)
    with FeatureWriter(tmp_path, num_global_layers=2) as writer:
        writer.add("v", torch.zeros(5, 4), stored)
    for asked, expected in ((None, stored[1:]), (2, stored[1:]), (1, stored[2:]), (0, stored[:0])):
        features = FeatureReader(tmp_path, num_global_layers=asked)["v"]
        assert torch.equal(features.global_features, expected)
        assert torch.equal(features.all_global_features, stored)


def test_progress_is_told_after_each_video_read_or_not(videos, tmp_path):
    model, processor = tiny_longvlm()
    calls = []
    extract_features([videos], tmp_path, model=model, processor=processor, progress=lambda *call: calls.append(call))
    assert calls == [("encode", done, 6) for done in range(1, 7)]


def test_windows_of_a_video_lie_in_one_folder_under_names_of_their_own(videos, tmp_path):
    model, processor = tiny_longvlm()
    extract = partial(extract_features, [videos / "v_3.mp4"], tmp_path / "out", model=model, processor=processor)
    wholes = extract()
    for start, end in ((0.5, 1.5), (0.5, None), (None, 1)):
        report = extract(video_options={"video_start": start, "video_end": end})
        assert (report.encoded, report.there_before, report.failed) == (1, 0, 0)
    assert wholes.encoded == 1 and extract().there_before == 1
    assert extract(video_options={"video_start": 0.5, "video_end": 1.50}).there_before == 1
    reader = FeatureReader(tmp_path / "out")
    assert {name: reader.window(name) for name in reader} == {
        "v_3": None,
        "v_3@0.5-1.5": (0.5, 1.5),
        "v_3@0.5-": (0.5, None),
        "v_3@0-1": (None, 1.0),
    }
    part = reader["v_3@0.5-1.5"]
    assert part.window == (0.5, 1.5) and 0.5 <= part.segment_seconds.min() <= part.segment_seconds.max() < 1.5
    # A file may be called like a window of another one.
    write_video(tmp_path / "v_3@0-1.mp4", 8)
    with pytest.raises(ValueError, match='holds another part of a video under the name "v_3@0-1"; rename that video'):
        extract_features([tmp_path / "v_3@0-1.mp4"], tmp_path / "out", model=model, processor=processor)


def test_failures_are_read_as_written_and_a_damaged_list_is_told(tmp_path):
    assert read_failed(tmp_path) == {}
    with FailureLog(tmp_path) as log:
        log.add("a", ValueError("two\nlines"))
        assert read_failed(tmp_path) == {"a": "two lines"}  # before the end, too: a kill loses nothing
    write_failed(tmp_path, {"b": "größer"})
    assert read_failed(tmp_path) == {"b": "größer"}
    (tmp_path / FAILED).write_text('{"video": "b"')
    with pytest.raises(ValueError, match=r"failed\.jsonl is damaged"):
        read_failed(tmp_path)
    write_failed(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def run_extract(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_share_the_videos_and_go_on_after_a_kill(videos, tmp_path):
    model = save_tiny_longvlm(tmp_path / "model")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "-m", "longvlm", "extract"]
    command = [*launch, videos, "--model", model, "--out", tmp_path / "out", "--quiet"]
    process = run_extract(*command)
    deadline = time.time() + 120
    while not list(tmp_path.glob("out/.part-*")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    subprocess.run(["kill", "-9", *children_of(process.pid), str(process.pid)], check=False)
    process.wait()
    process = run_extract(*command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert err.count("1 failed") == 1
    check_whole(tmp_path / "out", *tiny_longvlm(), videos)


def children_of(pid):
    import psutil

    return [str(child.pid) for child in psutil.Process(pid).children(recursive=True)]
