"""The model card: valid metadata, what the checkpoint says about itself, and nothing of the template left.

That its usage snippets run is tested in `test_publishing.py`, on a checkpoint loaded from a Hub.
"""

import json

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from longvlm.publishing.model_card import (
    check_card,
    complete_card,
    licence_warnings,
    make_card,
    read_results,
    template,
)
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm

RESULT = {
    "task_type": "video-text-to-text",
    "task_name": "Video question answering",
    "dataset_type": "me/stories",
    "dataset_name": "Stories",
    "dataset_split": "test",
    "metric_type": "accuracy",
    "metric_name": "Accuracy",
    "metric_value": 0.625,
}
ABOUT = {"license": "apache-2.0", "base_model": ["me/llm", "me/encoder"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("card") / "model")


def metadata(card) -> dict:
    return yaml.safe_load(str(card).split("---\n")[1])


def test_metadata_is_what_the_hub_reads(folder):
    card = make_card(
        folder,
        "me/tiny",
        **ABOUT,
        datasets=["me/stories"],
        language=["en", "de"],
        tags=["tiny"],
        results=[EvalResult(**RESULT)],
    )
    data = metadata(card)
    assert data["pipeline_tag"] == "video-text-to-text" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and data["base_model"] == ["me/llm", "me/encoder"]
    assert data["datasets"] == ["me/stories"] and data["metrics"] == ["accuracy"] and data["language"] == ["en", "de"]
    assert {"longvlm", "video-question-answering", "tiny"} <= set(data["tags"])
    (entry,) = data["model-index"]
    (measured,) = entry["results"]
    assert entry["name"] == "tiny"
    assert measured["dataset"] == {"name": "Stories", "type": "me/stories", "split": "test"}
    assert measured["metrics"] == [{"type": "accuracy", "value": 0.625, "name": "Accuracy"}]
    assert check_card(str(card)) == []
    # huggingface_hub's own reader takes it, and gives the results back.
    assert ModelCard(str(card)).data.eval_results[0].metric_value == 0.625


def test_text_says_what_was_measured_or_that_nothing_was(folder):
    measured = str(make_card(folder, "me/tiny", **ABOUT, results=[EvalResult(**RESULT)]))
    assert "| Video question answering | Stories, test | Accuracy | 0.625 |" in measured
    unmeasured = make_card(folder, "me/tiny", **ABOUT)
    assert "Nothing has been measured" in str(unmeasured) and "model-index" not in metadata(unmeasured)


@pytest.mark.parametrize(
    "settings, row",
    [
        ({"frames_per_segment": 5}, "| frames per segment (K) | 5 |"),
        ({"tokens_per_segment": 9}, "| tokens per segment after merging (M) | 9 |"),
        ({"num_global_layers": 1, "global_placement": "suffix"}, "| global tokens (E) | 1 (suffix) |"),
        ({"global_placement": "none"}, "| global tokens (E) | 0 (none) |"),
        ({"merge_schedule": [20, 30]}, "| pairs merged in each step | 20, 30 |"),
        ({"merge_similarity": "per_head"}, "| similarity | per_head, over 4 heads |"),
        ({"merge_order": "time"}, "| order of the tokens of a segment | time |"),
        ({"projector_type": "mlp2x_gelu"}, "| projector | mlp2x_gelu |"),
        ({"vision_feature_layer": -1}, "| hidden state that is merged | -1 |"),
    ],
)
def test_settings_come_from_the_configuration(settings, row, folder, tmp_path):
    changed = save_tiny_longvlm(tmp_path, **settings)
    assert row in str(make_card(changed, "me/tiny", **ABOUT))
    assert row not in str(make_card(folder, "me/tiny", **ABOUT))


def test_sizes_come_from_the_files(folder):
    model, processor = tiny_longvlm()
    card = str(make_card(folder, "me/tiny", **ABOUT))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"checkpoint with {parameters / 1000:.3g} k parameters" in card
    assert f"so that 8 frames become {processor.num_video_tokens(8)} tokens" in card


def test_untrained_parts_are_told(folder, tmp_path):
    assert "Not ready for use" not in str(make_card(folder, "me/tiny", **ABOUT))
    untrained = save_tiny_longvlm(tmp_path, untrained_parts=["vision_tower", "multi_modal_projector"])
    card = str(make_card(untrained, "me/tiny", **ABOUT))
    assert "**Not ready for use: untrained (vision tower and multi modal projector).** Until they are trained" in card


def test_text_fits_the_checkpoint(folder, tmp_path):
    card = str(make_card(folder, "me/tiny", **ABOUT, notice="**Synthetic videos only.**"))
    assert "global tokens of the whole\nvideo are added, so that 8 frames" in card
    assert "for the language model.\n\n**Synthetic videos only.**\n\n## How to use it" in card
    assert "- The licences of its parts (me/llm, me/encoder) apply to it as well." in card
    assert "for research only" in card
    without = save_tiny_longvlm(tmp_path, global_placement="none")
    card = str(make_card(without, "me/tiny", license="mit", base_model=["none"]))
    assert "global tokens of the whole" not in card and "in order of time, so that 8 frames" in card
    assert "licences of its parts" not in card and "for research only" not in card
    of_data = make_card(without, "me/tiny", license="mit", base_model=["none"], datasets=["me/stories"])
    assert "\n- Some of its training data may be for research only.\n\n## Citation" in str(of_data)


def test_nothing_of_the_template_is_left(folder):
    for results in (
        [],
        [EvalResult(task_type="x", dataset_type="y", dataset_name="z", metric_type="w", metric_value=1)],
    ):
        text = str(make_card(folder, "me/tiny", **ABOUT, results=results))
        assert not any(mark in text for mark in ("{{", "}}", "{%", "%}", "None", "|  |", "\n\n\n"))
        assert text.count("```") % 2 == 0 and "# tiny\n" in text
        assert "eccv" in text.lower() and "@inproceedings{weng2024longvlm" in text
        assert all(
            f"\n## {part}\n" in text for part in ("How to use it", "Architecture", "Results", "Limits", "Citation")
        )


def test_base_models_are_found_in_the_configuration(tmp_path):
    model, processor = tiny_longvlm()
    model.config.text_config._name_or_path, model.config.vision_config._name_or_path = "me/llm", "encoder-from-here"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    card = make_card(tmp_path, "me/tiny", license="mit")
    assert metadata(card)["base_model"] == ["me/llm"]
    assert "| language model | [me/llm](https://huggingface.co/me/llm) (llama, 2 layers, width 32) |" in str(card)
    assert "encoder-from-here" not in str(card)


def test_template_is_the_file_at_the_top():
    assert template() == (ROOT / "hub_card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"license": None}, "`license`"),
        ({"license": "Apache 2.0"}, "'Apache 2.0' is not a licence name"),
        ({"license": "other"}, "`license_name` and `license_link`"),
        ({"base_model": []}, "`base_model` none"),
        ({"base_model": ["llm"]}, "base_model 'llm' is not a Hub id"),
        ({"base_model": ["/home/me/llm"]}, "is not a Hub id"),
        ({"datasets": ["my data"]}, "datasets 'my data'"),
        ({"language": ["english!"]}, "'english!' is not a language code"),
    ],
)
def test_card_is_checked(changes, message, folder):
    (problem,) = check_card(str(make_card(folder, "me/tiny", **{**ABOUT, **changes})))
    assert message in problem


def test_what_passes_the_check(folder):
    other = {"license": "other", "license_name": "llama", "license_link": "https://example.org/licence"}
    assert check_card(str(make_card(folder, "me/tiny", **{**ABOUT, **other}))) == []
    scratch = make_card(folder, "me/tiny", license="mit", base_model=["none"])
    assert check_card(str(scratch), without_base_model=True) == [] and "base_model" not in metadata(scratch)


def test_wrong_kind_of_card_is_completed_or_refused():
    card = complete_card("---\npipeline_tag: text-generation\n---\nText", license="mit", base_model=["me/llm"])
    assert metadata(card)["pipeline_tag"] == "video-text-to-text" and card.text == "Text"
    assert check_card(str(card)) == []
    assert any("pipeline_tag" in problem for problem in check_card("---\nlicense: mit\nbase_model: a/b\n---\n"))
    assert "cannot be parsed" in check_card("---\n[a: b\n---\n")[0]
    assert "cannot be parsed" in check_card("---\nlicense: mit\nmodel-index: [{name: x, results: [{}]}]\n---\n")[0]


def test_own_card_takes_language_and_results():
    own = "---\nlanguage: en\nmetrics: [bleu]\n---\nText"
    result = EvalResult(**RESULT)
    card = complete_card(own, license="mit", base_model=["me/llm"], language=["de"], results=[result], model_name="x")
    data = metadata(card)
    assert data["language"] == ["de"] and data["metrics"] == ["accuracy"] and card.text == "Text"
    assert data["model-index"][0]["name"] == "x" and check_card(str(card)) == []
    assert ModelCard(str(card)).data.eval_results[0].metric_value == 0.625
    # Without them, what the card says stays; so does its own name for the model.
    named = str(card).replace("name: x", "name: y")
    again = metadata(complete_card(named, datasets=["me/stories"], results=[result], model_name="x"))
    assert again["language"] == ["de"] and again["model-index"][0]["name"] == "y"
    assert metadata(complete_card(own))["metrics"] == ["bleu"]


@pytest.mark.parametrize("name", ["lmsys/vicuna-7b-v1.1", "huggyllama/llama-7b", "me/LLaVA-Lightning-7B-delta-v1-1"])
def test_llama_1_and_its_kin_are_known_by_name(name, folder):
    assert "LLaMA-1" in licence_warnings(make_card(folder, "me/x", license="mit", base_model=[name]), {})[0]


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-2-7b-hf",
        "lmsys/vicuna-7b-v1.5",
        "meta-llama/Llama-3.1-8B",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "llava-hf/llava-1.5-7b-hf",
        "openai/clip-vit-large-patch14",
    ],
)
def test_later_models_are_not_taken_for_llama_1(name, folder):
    card = make_card(folder, "me/x", license="mit", base_model=[name])
    later = {"model_type": "llama", "vocab_size": 32003, "hidden_size": 4096, "max_position_embeddings": 4096}
    assert licence_warnings(card, {"text_config": later}) == []


def test_llama_1_is_known_by_its_shape(folder):
    card = make_card(folder, "me/x", **ABOUT)
    text = {"model_type": "llama", "vocab_size": 32003, "hidden_size": 4096, "max_position_embeddings": 2048}
    assert "shape of LLaMA-1" in licence_warnings(card, {"text_config": text})[0]
    assert licence_warnings(card, {"text_config": {**text, "hidden_size": 2048}}) == []


def test_results_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([RESULT]))
    assert read_results(path) == [EvalResult(**RESULT)]
    more = ({"unknown": 1}, {"source_name": "a table without its address"})
    for wrong in (json.dumps(RESULT), "[{}]", "not JSON", "\xff", *(json.dumps([RESULT | one]) for one in more)):
        path.write_text(wrong, encoding="latin-1")
        with pytest.raises(ValueError, match=r"results\.json is not a list of results") as error:
            read_results(path)
        assert "\n" not in str(error.value)
