"""`make smollm2` in small: a real language model, an encoder of longvlm-tiny's kind, thirty steps.

The encoder is untrained: the promise here is that the stages fit together and learn, not what is learned from videos.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from recipes.smollm2.language_model import smollm2_gguf
from tests.helpers.real_data import or_skip

pytestmark = pytest.mark.slow

SMALL = {
    "stories": 60,
    "frames": 40,
    "test-stories": 1,
    "projector-steps": 30,
    "piece-steps": 3,
    "story-steps": 3,
    "batch-size": 4,
    "logging-steps": 1,
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The example's folder, the LongVLM whose encoder it took, and the arguments."""
    from transformers import CLIPVisionModel

    from recipes.smollm2.run import main
    from recipes.tiny import recipe
    from recipes.tiny.vision import vision_config

    or_skip(smollm2_gguf)
    folder = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    vision, tokenizer = CLIPVisionModel(vision_config()), recipe.make_tokenizer(num_stories=10)
    config = recipe.make_config(vision, tokenizer)
    recipe.make_model(config, vision).save_pretrained(folder / "longvlm")
    recipe.make_processor(config, tokenizer).save_pretrained(folder / "longvlm")
    small = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    arguments = ["--out", str(folder / "out"), "--vision", str(folder / "longvlm"), *small]
    main([*arguments, "--report", str(folder / "page.md")])
    return folder, arguments


def results(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def test_thirty_steps_lower_the_loss(ran):
    losses = [loss for _, loss in results(ran[0])["stages"]["projector"]["losses"]]
    assert len(losses) == 30
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.85 * first, losses


def test_lora_starts_where_the_projector_ended(ran):
    stages = results(ran[0])["stages"]
    ended, went_on = stages["projector"]["losses"], stages["lora-pieces"]["losses"]
    assert went_on[0][1] < 1.3 * sum(loss for _, loss in ended[-5:]) / 5
    assert all(math.isfinite(loss) for _, loss in went_on)


def test_the_encoder_is_the_checkpoints_own_and_stays_as_it_is(ran):
    own, end = (
        {
            name: tensor.bfloat16()
            for name, tensor in load_file(ran[0] / part / "model.safetensors").items()
            if "vision_tower" in name
        }
        for part in ("longvlm", "out/lora-stories")
    )
    assert own and own.keys() == end.keys()
    assert all(torch.equal(own[name], end[name]) for name in own)


def test_a_second_call_only_reads_what_the_first_measured(ran, capsys):
    from recipes.smollm2.run import main

    folder, arguments = ran
    before = results(folder)
    main(arguments)
    assert results(folder) == before
    said = capsys.readouterr().out
    assert said.count("done before") == sum(len(before[group]) for group in ("stages", "events", "scores"))
    accuracy = before["scores"]["trained"]["accuracy"]
    assert f"| {100 * accuracy:.1f} (" in (folder / "page.md").read_text()


def test_a_folder_of_other_options_is_refused_in_one_line(ran):
    from recipes.smollm2.run import main

    with pytest.raises(SystemExit, match=r"^smollm2: .* with stories=60, not 61; give another --out$"):
        main([*ran[1], "--stories", "61"])
