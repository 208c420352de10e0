"""Feature pickles: only float arrays come out of them, and folders of them become shards that survive any stop.

Promises: nothing in a pickle runs, whatever it is; one bad file does not stop the others; nothing is lost or doubled.
"""

import json
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from longvlm.conversion.original_features import (
    convert_features,
    dump_float_array,
    layout_of_rows,
    load_float_array,
    read_feature_file,
)
from longvlm.features.store import FeatureReader, FeatureWriter, fingerprint
from longvlm_cli import app as cli
from tests.helpers.paths import FIXTURES

FEATURES = FIXTURES / "original_checkpoint" / "features"
ARRAY = np.arange(12, dtype=np.float16).reshape(3, 4) / 8


# --- what is read ---


@pytest.mark.parametrize("video", ["video_305", "video_205"])  # named as numpy 1 and as numpy 2 name things
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_originals_files_are_read_exactly(video, kind):
    found = read_feature_file(FEATURES / kind / f"{video}.pkl")
    expected = load_file(FIXTURES / "original_tiny.safetensors")[f"{video}.{kind}"]
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_protocol_float_and_order_is_read(protocol, dtype, order):
    array = np.array(ARRAY, dtype=dtype, order=order)
    found = load_float_array(pickle.dumps(array, protocol=protocol))
    assert np.array_equal(found, array) and found.dtype.isnative and found.flags.writeable


def test_names_of_numpy_1_and_2_are_the_same():
    for protocol in (2, 4, 5):
        data = pickle.dumps(ARRAY, protocol=protocol)
        old = data.replace(b"numpy._core", b"numpy.core")
        if protocol == 4:  # the name's length stands before it
            old = old.replace(b"\x16numpy.core.multiarray", b"\x15numpy.core.multiarray")
            old = fix_frame(old)
        if protocol != 5:
            assert np.array_equal(load_float_array(old), ARRAY)


def fix_frame(data):
    """A frame's length after its content changed."""
    assert data[2:3] == b"\x95"
    return data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]


# --- what is refused, and never run ---


class Call:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.value = function, arguments

    def __reduce__(self):
        return self.value


class WithState:
    def __reduce__(self):
        return np.ndarray, ((2, 2),), {"shape": (2, 2)}


def pickled(value, protocol=4):
    return pickle.dumps(value, protocol=protocol)


def attacks(harm):
    """Name -> bytes. Each that works makes the folder `harm`."""
    command, python = f"mkdir {harm}", f"__import__('os').mkdir({str(harm)!r})"
    yield from {
        "os.system": pickled(Call(os.system, command)),
        "os.system, protocol 0": pickled(Call(os.system, command), 0),
        "builtins.eval": pickled(Call(eval, python)),
        "builtins.exec": pickled(Call(exec, python), 2),
        "subprocess": pickled(Call(subprocess.Popen, ["mkdir", str(harm)])),
        "in a list": pickled([ARRAY, Call(os.mkdir, str(harm))]),
        "in a dict": pickled({"features": Call(os.mkdir, str(harm))}),
        "in an object array": pickled(np.array([[Call(os.mkdir, str(harm))]], dtype=object)),
        "as the shape": pickled(Call(np.ndarray, Call(os.mkdir, str(harm)))),
        "getattr": pickled(Call(getattr, ARRAY, "tofile")),
        "numpy.load": pickled(Call(np.load, "x.npy")),
        "INST": b"(S'mkdir " + str(harm).encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nmkdir\nS'" + str(harm).encode() + b"'\no.",
        "before the array": b"cos\nmkdir\n(S'" + str(harm).encode() + b"'\ntR0" + pickled(ARRAY, 2),
        "after the array": pickled(ARRAY) + pickled(Call(os.mkdir, str(harm))),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x1bctypeslib.os.mkdir.__call__\x93\x8c\x01x\x85R.",
        "numpy's own testing": b"cnumpy.testing._private.utils\nruncmd\n(S'x'\ntR.",
        "another class": b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nbytearray\n(I9\ntS'b'\ntR.",
        "state of a name": b"cnumpy\ndtype\n}S'x'\nI1\nsb.",
        "state of a function": b"cnumpy.core.multiarray\n_reconstruct\n(NNtb.",
    }.items()


ATTACKS = [name for name, _ in attacks("x")]


@pytest.mark.parametrize("name", ATTACKS)
def test_malicious_pickles_are_refused_and_do_nothing(name, tmp_path):
    harm = tmp_path / "harm"
    file = tmp_path / "video.pkl"
    file.write_bytes(dict(attacks(harm))[name])
    with pytest.raises(ValueError, match="is not read: ") as error:
        read_feature_file(file)
    assert "\n" not in str(error.value) and not harm.exists()


def huge(shape):
    """A pickle of a few bytes that promises an array of that shape."""
    state = pickle.dumps((1, shape, np.dtype("f2"), False, b"\0\0"), protocol=2)[2:-1]
    return b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state + b"b."


OTHERS = {
    "a list": [1.0, 2.0],
    "a number": 1.0,
    "an array of integers": np.zeros((2, 2), dtype=np.int64),
    "an array of objects": np.array([[1, "a"]], dtype=object),
    "an array of strings": np.array([["a"]]),
    "an array of records": np.zeros((2, 2), dtype=[("a", "f4")]),
    "an array of complex numbers": np.zeros((2, 2), dtype=complex),
    "an array of times": np.zeros((2, 2), dtype="M8[s]"),
    "a vector": np.zeros(3, dtype=np.float16),
    "a cube": np.zeros((2, 2, 2), dtype=np.float16),
    "an empty array": np.zeros((0, 4), dtype=np.float16),
    "a masked array": np.ma.masked_array(ARRAY),
    "a scalar of numpy": np.float16(1),
    "a matrix": np.asmatrix(ARRAY),
    "a tensor": torch.zeros(2, 2),
    "two arrays": (ARRAY, ARRAY),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_anything_but_a_float_matrix_is_refused(name, protocol):
    with pytest.raises(ValueError):
        load_float_array(pickle.dumps(OTHERS[name], protocol=protocol))


DAMAGED = {
    "nothing": b"",
    "cut short": pickled(ARRAY)[:-20],
    "without its end": pickled(ARRAY)[:-1],
    "text": b"these are not features",
    "a line feed follows": pickled(ARRAY) + b"\n",
    "two pickles": pickled(ARRAY) * 2,
    "another byte count": pickled(ARRAY).replace(b"C\x18", b"C\x17"),
    "a huge shape": huge((10**9, 10**9)),
    "a shape of huge numbers": huge((10**300, 10**300)),
    "a negative shape": huge((-1, -1)),
    "a shape of truth values": huge((True, True)),
    "a huge byte count": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a far memo": b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".",
    "endless instructions": b"\x80\x04" + b"N" * 10**6 + b".",
    "nested tuples": b"\x80\x04N" + b"\x85" * 10**5 + b".",
    "an endless number": b"L" + b"9" * 10**6 + b"L\n.",
    "a persistent id": b"\x80\x04\x8c\x01xQ.",
    "an extension": b"\x80\x04\x82\x01.",
    "an outside buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_are_refused_within_little_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            load_float_array(DAMAGED[name])
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 300


@given(st.binary(max_size=200))
@example(b"\x80\x02cnumpy\ndtype\n.")
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_anything_but_raise(data):
    for candidate in (data, pickled(ARRAY)[:40] + data, data + pickled(ARRAY)[-60:]):
        with pytest.raises(ValueError):
            load_float_array(candidate)


@given(st.integers(0, len(pickled(ARRAY)) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_gives_a_float_matrix_or_an_error(position, value):
    data = bytearray(pickled(ARRAY))
    data[position] = value
    try:
        found = load_float_array(bytes(data))
    except ValueError:
        return
    assert found.ndim == 2 and found.dtype.kind == "f" and found.nbytes <= len(data)


# --- export to the original format ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read_by_numpy_of_any_version(dtype):
    data = dump_float_array(ARRAY.astype(dtype))
    assert np.array_equal(pickle.loads(data), ARRAY) and np.array_equal(load_float_array(data), ARRAY)
    names = [argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"]
    # numpy 1 has no numpy._core; numpy 2 still knows the old name.
    assert sorted(set(names)) == ["numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct"]


# --- folders ---


def write_features(folder, count, *, rows=6, width=8, memory_rows=7):
    """`count` videos in `local/` and `memory/`; returns what they hold."""
    rng = np.random.default_rng(0)
    values = {}
    for kind in ("local", "memory"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        name = f"v_{number:03}"
        pair = [rng.standard_normal((n, width)).astype(np.float16) for n in (rows, memory_rows)]
        for kind, array in zip(("local", "memory"), pair, strict=True):
            (folder / kind / f"{name}.pkl").write_bytes(pickled(array))
        values[name] = pair
    return values


def check_features(out, values):
    reader = FeatureReader(out)
    assert sorted(reader) == sorted(values) and len(reader) == len(values)
    for name, (local, memory) in values.items():
        found = reader[name]
        assert np.array_equal(found.local_features.numpy(), local)
        assert np.array_equal(found.all_global_features.numpy(), memory)
        assert np.array_equal(found.global_features.numpy(), memory[-5:])
    # Every video lies in one shard, and every shard is whole.
    stored = [key for shard in out.glob("*.safetensors") for key in load_file(shard)]
    assert len(stored) == len(set(stored)) == 2 * len(values)


def test_folders_become_shards_in_random_access(tmp_path):
    values = write_features(tmp_path, 20)
    out = tmp_path / "out"
    report = convert_features(tmp_path / "local", tmp_path / "memory", out, shard_bytes=1000)
    assert (report.converted, report.there_before, report.failed) == (20, 0, 0)
    assert len(list(out.glob("features-*.safetensors"))) > 3
    check_features(out, values)
    reader = FeatureReader(out)
    assert reader.width == 8 and reader.num_local_tokens("v_003") == 6
    assert reader.fingerprint == fingerprint({**reader.metadata, "num_global_layers": 5})
    assert "v_003" in reader and "v_999" not in reader
    copy = pickle.loads(pickle.dumps(reader))  # as for the workers of a DataLoader
    assert torch.equal(copy["v_019"].local_features, reader["v_019"].local_features)
    assert not list(out.glob(".*.partial*")) and not (out / "failed.jsonl").exists()


def test_features_go_into_the_model_as_they_are(tmp_path):
    from tests.helpers.tiny_models import tiny_longvlm

    write_features(tmp_path, 1, rows=12, width=64)
    convert_features(tmp_path / "local", tmp_path / "memory", tmp_path / "out", num_global_layers=2)
    model, processor = tiny_longvlm()
    features = FeatureReader(tmp_path / "out")["v_000"].as_video_features()
    inputs = processor(text="<video> What?", num_video_tokens=14, return_tensors="pt")
    assert torch.isfinite(model(**inputs, video_features=features).logits).all()


def test_bad_files_are_listed_and_do_not_stop_the_others(tmp_path):
    values = write_features(tmp_path, 8)
    local, memory = tmp_path / "local", tmp_path / "memory"
    (local / "v_000.pkl").write_bytes(pickled(Call(os.mkdir, str(tmp_path / "harm"))))
    (local / "v_001.pkl").write_bytes(pickled(ARRAY)[:50])
    (memory / "v_002.pkl").unlink()
    (memory / "v_003.pkl").write_bytes(pickled(np.zeros((7, 4), np.float16)))
    (memory / "v_004.pkl").write_bytes(pickled(np.zeros((3, 8), np.float16)))
    (local / "v_005.pkl").write_bytes(pickled(np.full((6, 8), np.nan, np.float16)))
    out = tmp_path / "out"
    report = convert_features(local, memory, out)
    assert (report.converted, report.failed) == (2, 6) and "failed.jsonl" in str(report)
    reasons = {row["video"]: row["reason"] for row in map(json.loads, (out / "failed.jsonl").read_text().splitlines())}
    assert sorted(reasons) == [f"v_00{n}" for n in range(6)]
    for video, part in zip(
        sorted(reasons), ["mkdir", "cut short", "does not exist", "width", "at least 1 and 5", "finite"], strict=True
    ):
        assert part in reasons[video]
    assert not (tmp_path / "harm").exists()
    # Repaired, they are taken in the next time, and only they.
    for name in list(values)[:6]:
        for kind, array in zip((local, memory), values[name], strict=True):
            (kind / f"{name}.pkl").write_bytes(pickled(array))
    report = convert_features(local, memory, out)
    assert (report.converted, report.there_before, report.failed) == (6, 2, 0)
    check_features(out, values)
    assert not (out / "failed.jsonl").exists()


def test_the_report_says_which_layout_the_features_fit(tmp_path):
    report = convert_features(FEATURES / "local", FEATURES / "memory", tmp_path / "out")
    assert "1 with 300 rows: layout paper" in str(report) and "1 with 200 rows: layout released" in str(report)
    assert layout_of_rows(250) is None


def test_a_killed_run_is_resumed(tmp_path):
    values = write_features(tmp_path, 300, rows=300, width=64)  # 13 MB
    sources, out = (tmp_path / "local", tmp_path / "memory"), tmp_path / "out"
    command = [sys.executable, "-m", "longvlm", "convert", "features", *map(str, sources), "--out", str(out)]
    deadline = time.monotonic() + 60
    with subprocess.Popen([*command, "--shard-size", "1", "--quiet"]) as process:
        while len(list(out.glob("features-*.safetensors"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
        process.kill()
    before = json.loads((out / "index.json").read_text())["videos"]
    assert 0 < len(before) < 300
    report = convert_features(*sources, out, shard_bytes=10**6)
    assert report.there_before >= len(before) and report.there_before + report.converted == 300
    check_features(out, values)


@pytest.mark.parametrize("moment", ["before the shard has its name", "before the index", "within the index"])
def test_a_stop_at_any_moment_loses_and_doubles_nothing(moment, tmp_path, monkeypatch):
    values = write_features(tmp_path, 12)
    sources, out = (tmp_path / "local", tmp_path / "memory"), tmp_path / "out"
    replace, calls = os.replace, []

    class Stop(BaseException):
        pass

    def stopped(temporary, final):
        calls.append(final.name)
        if len(calls) >= 4:  # every later one, too: nothing more is written by a process that is gone
            wanted = "index.json" if "index" in moment else "features-"
            if final.name.startswith(wanted) or len(calls) > 4:
                content = temporary.read_bytes()
                # As a killed process leaves it: `atomic_write` itself would still clear it away.
                left = temporary.with_name(temporary.name.replace(f"-{os.getpid()}.", "-999999999."))
                left.write_bytes(content[:50] if moment == "within the index" else content)
                raise Stop
        replace(temporary, final)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(Stop):
        convert_features(*sources, out, shard_bytes=500)
    assert list(out.glob(".*.partial-999999999.*"))
    monkeypatch.setattr(os, "replace", replace)
    convert_features(*sources, out, shard_bytes=500)
    check_features(out, values)
    assert not list(out.glob(".*.partial*"))


def test_a_folder_is_not_mixed_with_other_features(tmp_path):
    write_features(tmp_path, 2)
    sources, out = (tmp_path / "local", tmp_path / "memory"), tmp_path / "out"
    convert_features(*sources, out)
    with pytest.raises(ValueError, match="made in another way"):
        convert_features(*sources, out, num_global_layers=2)
    with pytest.raises(ValueError, match="made in another way"):
        FeatureWriter(out, metadata={"source": "mine"})
    with (
        FeatureWriter(tmp_path / "mine", metadata={"a": 1, "b": 2}),
        pytest.raises(ValueError, match="being written to by another process"),
    ):
        FeatureWriter(tmp_path / "mine", metadata={"b": 2, "a": 1})
    with FeatureWriter(tmp_path / "mine", metadata={"b": 2, "a": 1}) as writer:  # the order says nothing
        writer.add("a/video with spaces ä", torch.ones(3, 4), torch.ones(5, 4))
        with pytest.raises(ValueError, match="is there already"):
            writer.add("a/video with spaces ä", torch.ones(3, 4), torch.ones(5, 4))
        with pytest.raises(ValueError, match=r"width 5 \(local\)"):
            writer.add("other", torch.ones(3, 5), torch.ones(5, 5))
    assert list(FeatureReader(tmp_path / "mine")) == ["a/video with spaces ä"]


def test_wrong_folders_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["longvlm", "convert", "features", *map(str, arguments), "-q"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.count("\n") == 1
        return message

    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "out")
    assert "nowhere is not a folder" in refused(tmp_path / "nowhere", tmp_path / "empty", *out)
    assert "contains no .pkl files" in refused(tmp_path / "empty", tmp_path / "empty", *out)
    shutil.copytree(FEATURES / "local", tmp_path / "local")
    assert "not one of 2 files could be read" in refused(tmp_path / "local", tmp_path / "empty", *out)
    with pytest.raises(ValueError, match=r"contains no features: index.json is missing"):
        FeatureReader(tmp_path / "empty")
    (tmp_path / "empty" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an index of LongVLM features"):
        FeatureReader(tmp_path / "empty")


def test_parts_of_one_tensor_can_be_written(tmp_path):
    whole = torch.arange(40.0).reshape(5, 8)
    with FeatureWriter(tmp_path, num_global_layers=2) as writer:
        writer.add("whole", whole, whole[:2])
        writer.add("piece", whole[1:3], whole[:2])
        whole.zero_()
    reader = FeatureReader(tmp_path)
    assert torch.equal(reader["piece"].local_features, reader["whole"].local_features[1:3])
    assert reader["piece"].local_features[0, 0] == 8


def test_shards_are_as_readable_as_other_files(tmp_path):
    with FeatureWriter(tmp_path / "features", num_global_layers=2) as writer:
        writer.add("video", torch.zeros(3, 8), torch.zeros(4, 8))
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "other", *(tmp_path / "features").glob("features-*")]}
    assert len(modes) == 1
