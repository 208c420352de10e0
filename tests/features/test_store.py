"""The feature store: what is known of a video is kept with its features, and damage does not go unnoticed."""

import json
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from longvlm.features.extract import extract_features
from longvlm.features.fingerprint import fingerprint
from longvlm.features.store import FeatureReader, FeatureWriter
from longvlm.features.videos import window_name
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMVideoFeatures
from tests.helpers.tiny_models import tiny_longvlm
from tests.helpers.video_files import write_video

SECONDS = torch.tensor([[0.0, 0.7], [0.8, 1.5], [1.6, 1.9]], dtype=torch.float64)
KINDS = ("local", "memory")
FACTS = {"num_frames": 10, "duration": 2.1, "frames_per_segment": 4}


def store_some(folder, count=3, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    with FeatureWriter(folder, num_global_layers=2, **options) as writer:
        for number in range(count):
            local, global_ = (torch.randn(rows, 4, generator=generator).to(dtype) for rows in (5, 3))
            writer.add(f"v_{number}", local, global_, **FACTS, segment_seconds=SECONDS, window=(60, None))
    return folder


def store_as_version_1(folder, videos):
    """A folder as longvlm wrote it before checksums: name -> (local, global)."""
    folder.mkdir()
    tensors = {f"{video}/{kind}": pair[kind == "memory"] for video, pair in videos.items() for kind in KINDS}
    entries = {video: {"local": len(pair[0]), "memory": len(pair[1])} for video, pair in videos.items()}
    described = {"width": 4, "videos": entries}
    shard = folder / "features-00001.safetensors"
    save_file(tensors, shard, metadata={"format": "pt", "longvlm-features": json.dumps(described)})
    index = {"format": "longvlm-features", "version": 1, "width": 4, "num_global_layers": 2, "metadata": {}}
    index |= {"fingerprint": fingerprint({"num_global_layers": 2})}
    index |= {"videos": {video: {**entry, "shard": shard.name} for video, entry in entries.items()}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def content(reader):
    """Everything that a reader gives, comparable."""
    names = ("num_frames", "duration", "frames_per_segment", "window")
    return {
        video: [
            *(getattr(one, name) for name in names),
            *(str(t.dtype) for t in (one.local_features, one.all_global_features)),
            *(t.tolist() for t in (one.local_features, one.all_global_features, one.segment_seconds)),
        ]
        for video, one in reader.items()
    }


def test_extracted_features_say_about_their_video_what_encoded_ones_say(tmp_path):
    model, processor = tiny_longvlm()
    write_video(tmp_path / "v.mp4", 25, rate=8)
    expected = LongVLMEngine(model, processor).encode(tmp_path / "v.mp4", num_frames=10)
    options = {"num_frames": 10}
    extract_features([tmp_path], tmp_path / "out", model=model, processor=processor, video_options=options)
    stored = pickle.loads(pickle.dumps(FeatureReader(tmp_path / "out")))["v"]
    assert (stored.num_frames, stored.frames_per_segment, stored.window) == (10, 4, None)
    assert stored.duration == expected.duration[0] == pytest.approx(25 / 8)
    assert torch.equal(stored.segment_seconds, expected.segment_seconds[0]) and len(stored.segment_seconds) == 3
    joined = LongVLMVideoFeatures.cat([expected, stored.as_video_features()])
    for name in ("num_frames", "duration", "frames_per_segment"):
        assert joined[name][0] == joined[name][1] is not None
    assert torch.equal(*joined.segment_seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_is_read_as_it_was_written(tmp_path, dtype):
    reader = FeatureReader(store_some(tmp_path, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        local, global_ = (torch.randn(rows, 4, generator=generator).to(dtype) for rows in (5, 3))
        found = reader[f"v_{number}"]
        assert torch.equal(found.local_features, local) and torch.equal(found.all_global_features, global_)
        assert {name: getattr(found, name) for name in FACTS} == FACTS and found.window == (60.0, None)
        assert torch.equal(found.segment_seconds, SECONDS)


def test_no_flipped_byte_of_a_shard_goes_unnoticed(tmp_path):
    store_some(tmp_path, dtype=torch.float16)
    expected = content(FeatureReader(tmp_path))
    shard = tmp_path / "features-00001.safetensors"
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")  # of the tensors
    dice = random.Random(0)
    places = [*range(start, len(whole)), *dice.sample(range(start), 300)]
    noticed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        shard.write_bytes(damaged)
        try:
            found = content(FeatureReader(tmp_path))
        except ValueError as error:
            assert str(shard) in str(error) and "remove this file" in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            assert found == expected, place  # a space behind the header, say
    assert noticed >= len(whole) - start + 250


def test_damage_is_noticed_at_the_first_reading_and_spares_the_other_videos(tmp_path):
    store_some(tmp_path)
    shard = tmp_path / "features-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    position = damaged.find(FeatureReader(tmp_path)["v_1"].local_features.numpy().tobytes())
    damaged[position + 7] ^= 4
    shard.write_bytes(damaged)
    reader = FeatureReader(tmp_path)
    assert reader["v_0"].local_features.shape == reader["v_2"].local_features.shape == (5, 4)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r'features-00001.safetensors: the features of the video "v_1" are damaged'
        ):
            reader["v_1"]


def test_a_shard_cut_short_mixed_up_or_gone_is_one_line(tmp_path):
    for name, count in (("one", 2), ("other", 3)):
        store_some(tmp_path / name, count)
    shard, other = (tmp_path / name / "features-00001.safetensors" for name in ("one", "other"))
    whole = shard.read_bytes()
    other.write_bytes(whole)
    with pytest.raises(ValueError, match='"v_2" are damaged'):
        FeatureReader(tmp_path / "other")["v_2"]
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * 64, whole[:8] + b"[" * (len(whole) - 8)):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"features-00001.safetensors is damaged or not a shard of features"):
            FeatureReader(tmp_path / "one")["v_0"]
        with pytest.raises(ValueError, match=r"features-00001.safetensors is damaged or not a shard of features"):
            FeatureWriter(tmp_path / "one", num_global_layers=2)
    shard.unlink()
    with pytest.raises(ValueError, match=r"features-00001.safetensors is damaged .*No such file"):
        FeatureReader(tmp_path / "one")["v_0"]
    # The remedy that the message names.
    store_some(tmp_path / "one", 2)
    assert set(FeatureReader(tmp_path / "one")) == {"v_0", "v_1"}


def test_shards_of_version_1_still_read_and_one_line_says_what_they_lack(tmp_path, caplog):
    videos = {f"v_{n}": (torch.randn(5, 4), torch.randn(3, 4)) for n in range(2)}
    folder = store_as_version_1(tmp_path / "old", videos)
    with caplog.at_level("WARNING"):
        reader = FeatureReader(folder)
        found = [reader[name] for name in videos]
    (record,) = caplog.records
    assert "2 of 2 videos were stored by an older version, without checksums and times" in record.getMessage()
    for one, (local, global_) in zip(found, videos.values(), strict=True):
        assert torch.equal(one.local_features, local) and torch.equal(one.all_global_features, global_)
        assert one.num_frames is one.duration is one.segment_seconds is one.window is None
        features = one.as_video_features()
        assert features.num_frames is features.segment_seconds is None
    # A folder that is added to keeps what it has, as it is.
    with FeatureWriter(folder, num_global_layers=2) as writer:
        assert "v_1" in writer
        writer.add("v_2", torch.ones(5, 4), torch.ones(3, 4), **FACTS, segment_seconds=SECONDS)
    assert json.loads((folder / "index.json").read_text())["version"] == 2
    with caplog.at_level("WARNING"):
        mixed = FeatureReader(folder)
    assert "2 of 3 videos were stored by an older version" in caplog.records[-1].getMessage()
    assert torch.equal(mixed["v_0"].local_features, videos["v_0"][0]) and mixed["v_2"].num_frames == 10
    joined = LongVLMVideoFeatures.cat(mixed[name].as_video_features() for name in ("v_0", "v_2"))
    assert joined.num_frames == (None, 10)


def test_features_with_checksums_are_read_without_a_word(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        content(FeatureReader(store_some(tmp_path)))
    assert not caplog.records


def test_a_lost_or_damaged_index_is_made_again_from_the_shards(tmp_path):
    expected = content(FeatureReader(store_some(tmp_path, shard_bytes=100)))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for damaged in (b"", b'{"format": "longvlm-features", "version": 2', b"[" * 10**5):
        (tmp_path / "index.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index.json is not an index .* remove it and run what made the folder"):
            FeatureReader(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="made in another way"):
        FeatureWriter(tmp_path, num_global_layers=1)
    FeatureWriter(tmp_path, num_global_layers=2).close()
    assert content(FeatureReader(tmp_path)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"version": "two"},
        {"metadata": None},
        {"num_global_layers": "2"},
        {"fingerprint": ""},
        {"videos": []},
        {"videos": {"v_0": {"local": 5, "memory": 3, "shard": "../other/features-00001.safetensors"}}},
        {"videos": {"v_0": {"local": 5, "memory": 3, "shard": "/etc/passwd"}}},
        {"videos": {"v_0": {"memory": 3}}},
        {"videos": {"v_0": 1}},
    ],
    ids=str,
)
def test_an_index_with_something_else_in_it_is_refused(tmp_path, change):
    store_some(tmp_path)
    file = tmp_path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"index.json is not an index of LongVLM features"):
        FeatureReader(tmp_path)


def test_a_newer_format_is_refused_by_its_version(tmp_path):
    store_some(tmp_path)
    file = tmp_path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 3, "videos": {"v": {"place": 4}}}))
    with pytest.raises(ValueError, match="has version 3; this longvlm reads up to 2; update it"):
        FeatureReader(tmp_path)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"duration": float("nan")}, "duration=nan"),
        ({"duration": -1.0}, "duration=-1.0"),
        ({"segment_seconds": torch.zeros(3, 3)}, r"must be finite numbers \(S, 2\)"),
        ({"segment_seconds": torch.full((3, 2), float("inf"))}, "must be finite"),
        ({"segment_seconds": SECONDS[:2], **FACTS}, "has 2 rows; 10 frames make 3 segments of 4"),
    ],
)
def test_what_no_video_has_is_refused(tmp_path, facts, reason):
    with FeatureWriter(tmp_path, num_global_layers=2) as writer, pytest.raises(ValueError, match=reason):
        writer.add("v", torch.ones(5, 4), torch.ones(3, 4), **facts)
    assert len(FeatureReader(tmp_path)) == 0


def test_parts_of_a_video_have_names_of_their_own():
    assert window_name("a/film") == "a/film"
    assert window_name("a/film", 90, 120.5) == "a/film@90-120.5"
    assert window_name("film", 0.1 + 0.2, 5025.125) == "film@0.3-5025.125"
    assert window_name("film", video_end=10) == window_name("film", 0, 10.0) == "film@0-10"
    assert window_name("film", 100000) == "film@100000-"
