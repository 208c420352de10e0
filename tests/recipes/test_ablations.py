"""The ablations: what each variant gives the language model, and that the report says what the runs found."""

import json

import pytest
import torch

from longvlm.evaluation.storyline import KINDS
from longvlm.modeling_longvlm.token_merging import merge_tokens
from recipes.ablations import report
from recipes.ablations.run import encode, lessons_of, planned, run_one
from recipes.ablations.variants import VARIANTS, condense, num_tokens
from recipes.tiny import vision as tiny_vision
from recipes.tiny.recipe import make_config, make_model, make_processor, make_tokenizer

BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def video():
    torch.manual_seed(0)
    return torch.randn(100, 64, 32), torch.randn(4, 100, 32)


def test_main_variants_have_about_as_many_tokens():
    counts = {variant.name: num_tokens(variant) for variant in VARIANTS if variant.main}
    assert counts.pop("global") == 4  # there are no more than the encoder has layers
    assert all(99 <= count <= 104 for count in counts.values()), counts


def test_longvlm_is_the_paper_s_merging_with_global_tokens(video):
    patches, class_tokens = video
    local, global_ = condense(BY_NAME["longvlm"], patches, class_tokens)
    expected = merge_tokens(patches.reshape(10, 640, 32), num_tokens=10, num_heads=4)
    assert torch.equal(local, expected.flatten(0, 1))
    torch.testing.assert_close(global_, class_tokens.mean(1))


def test_pooled_variants_are_means(video):
    patches, class_tokens = video
    local, _ = condense(BY_NAME["mean"], patches, class_tokens)
    torch.testing.assert_close(local, patches.mean(1))
    temporal, spatial = condense(BY_NAME["pooled"], patches, class_tokens)
    torch.testing.assert_close(temporal[3], patches[6:8].mean((0, 1)))
    assert spatial.shape == (49, 32)
    torch.testing.assert_close(spatial[0], patches[:, [0, 1, 8, 9]].mean((0, 1)))
    local, global_ = condense(BY_NAME["text"], patches, class_tokens)
    assert len(local) == len(global_) == 0


def test_main_rows_have_all_seeds_the_others_one():
    runs = planned(3)
    assert all(sum(its is variant for its, _ in runs) == (3 if variant.main else 1) for variant in VARIANTS)


@pytest.mark.slow
def test_a_run_of_every_kind_of_variant_trains_and_scores(tmp_path):
    vision, tokenizer = tiny_vision.CLIPVisionModel(tiny_vision.vision_config()), make_tokenizer()
    encode(vision, "train", 3, tmp_path / "train")
    encode(vision, "test", 1, tmp_path / "test")
    config = make_config(vision, tokenizer, width=64)
    start, processor = make_model(config, vision), make_processor(config, tokenizer)
    for name in ("longvlm", "text", "pooled"):
        (lesson,) = lessons_of(BY_NAME[name], tmp_path, "test", processor, per_kind=1)[100]
        assert len(lesson.local) + len(lesson.global_) == num_tokens(BY_NAME[name])
        result = run_one(start, BY_NAME[name], 0, tmp_path, steps=4)
        assert result["tokens"] == num_tokens(BY_NAME[name])
        assert 0 <= result["accuracy"] <= 1 and result["questions"] >= 15


def test_report_tells_means_and_spread_and_keeps_the_text_around(tmp_path):
    pytest.importorskip("matplotlib")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir(), docs.mkdir()
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        run = {"variant": "longvlm", "seed": seed, "tokens": 104, "steps": 7, "seconds": 60, "questions": 100}
        run |= {"accuracy": accuracy, "kinds": dict.fromkeys(KINDS, accuracy)}
        (results / f"longvlm-{seed}.json").write_text(json.dumps(run))
    (docs / "ablations.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_report(results, docs)
        text = (docs / "ablations.md").read_text()
        assert "60.0 ± 10.0" in text and "| 104 | 3 |" in text and "3 runs, 3 minutes" in text
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    first = (docs / report.PLOT).read_bytes()
    report.write_report(results, docs)
    assert first[:4] == b"\x89PNG" and first == (docs / report.PLOT).read_bytes()
