"""Assembling: encoders and language models of many kinds become one checkpoint that says what its LLM says.

Promises: text alone gives the LLM's own logits, preprocessing is the encoder's, nothing is copied, and what cannot be
supported is refused before anything is written.
"""

import json
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from longvlm import LongVLMForConditionalGeneration, LongVLMProcessor
from longvlm.conversion.assemble import VIDEO_TOKENS, assemble, join
from longvlm.conversion.language_model import load_language
from longvlm.conversion.vision_encoder import load_vision
from longvlm.files import output_folder
from longvlm_cli import app as cli
from tests.helpers.tiny_models import save_tiny_llm, tiny_text_config, tiny_tokenizer, tiny_vision_config

METHOD = {"num_global_layers": 2, "frames_per_segment": 4, "tokens_per_segment": 6}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": len(tiny_tokenizer(video_tokens=False)), "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}


def vision_folder(kind, folder):
    """An encoder with its image processor; returns frame side and patches a frame."""
    picture = {**SMALL, "image_size": 56, "patch_size": 14}
    towers = {"text_config": {**SMALL, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}}
    if kind == "clip":
        CLIPModel(CLIPConfig(**towers, vision_config=picture)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
        return 56, 16
    if kind == "clip_tower":
        CLIPVisionModel(tiny_vision_config()).save_pretrained(folder)  # and no image processor
        return 56, 16
    if kind == "siglip":
        SiglipModel(SiglipConfig(**towers, vision_config=picture)).save_pretrained(folder)
        SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
        return 56, 16
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**{**picture, "image_size": 70}, mlp_ratio=2)).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
        return 56, 16
    assert kind == "vit"
    ViTModel(ViTConfig(**{**picture, "patch_size": 8}), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    return 56, 49


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A CLIP and a Llama folder."""
    folder = tmp_path_factory.mktemp("parts")
    vision_folder("clip", folder / "clip")
    save_tiny_llm(folder / "llm", chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return folder / "clip", folder / "llm"


def video_frames(side=60, count=5):
    return list(torch.randint(0, 256, (count, 3, side, side + 8), dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["clip", "clip_tower", "siglip", "dinov2", "vit"])
def test_any_vision_encoder(kind, parts, tmp_path):
    side, patches = vision_folder(kind, tmp_path / "vision")
    out = assemble(tmp_path / "vision", parts[1], tmp_path / "out", **METHOD)
    model = LongVLMForConditionalGeneration.from_pretrained(out).eval()
    processor = LongVLMProcessor.from_pretrained(out)
    assert model.config.patches_per_frame == processor.patches_per_frame == patches
    assert model.config.untrained_parts == ["multi_modal_projector"]

    own = load_vision(tmp_path / "vision").model
    pixels = torch.randn(3, 3, side, side)
    kept = model.model.vision_tower
    options = {"interpolate_pos_encoding": True} if kind in ("siglip", "clip") else {}
    for mine, theirs in zip(
        kept(pixels, output_hidden_states=True, **options).hidden_states,
        own(pixels, output_hidden_states=True, **options).hidden_states,
        strict=True,
    ):
        assert torch.equal(mine, theirs)

    inputs = processor(text="<vid_patch>What?", videos=[video_frames()], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 5, 3, side, side)
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_frames_are_prepared_as_the_encoder_s_own_pictures(kind, parts, tmp_path):
    from transformers import AutoImageProcessor

    vision_folder(kind, tmp_path / "vision")
    out = assemble(tmp_path / "vision", parts[1], tmp_path / "out", **METHOD)
    frames = video_frames()
    mine = LongVLMProcessor.from_pretrained(out).video_processor(
        [frames], return_tensors="pt", do_sample_frames=False
    )["pixel_values_videos"][0]
    own = AutoImageProcessor.from_pretrained(tmp_path / "vision")(frames, return_tensors="pt")["pixel_values"]
    assert mine.shape == own.shape
    # The library's own backends differ by two grey levels at most.
    assert (mine - own).abs().max() < 2.5 / 255 / 0.22


def reference_logits(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny_text_config(vocab_size=TEXT["vocab_size"]), id="llama"),
        pytest.param(tiny_text_config(vocab_size=TEXT["vocab_size"], tie_word_embeddings=True), id="llama-tied"),
        pytest.param(tiny_text_config(vocab_size=TEXT["vocab_size"] + 40), id="llama-with-unused-rows"),
        pytest.param(Qwen2Config(**GROUPED, tie_word_embeddings=True), id="qwen2"),
        pytest.param(Qwen3Config(**GROUPED, head_dim=16), id="qwen3"),
        pytest.param(MistralConfig(**GROUPED, head_dim=16), id="mistral"),
        pytest.param(Gemma2Config(**GROUPED, head_dim=16), id="gemma2-with-soft-cap"),
        pytest.param(PhiConfig(**TEXT), id="phi-with-bias"),
        pytest.param(
            GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=TEXT["vocab_size"], bos_token_id=1, eos_token_id=2),
            id="gpt2",
        ),
    ],
)
def test_any_language_model_says_of_text_what_it_said_before(config, parts, tmp_path):
    save_tiny_llm(tmp_path / "llm", text_config=config)
    out = assemble(parts[0], tmp_path / "llm", tmp_path / "out", **METHOD)
    model, info = LongVLMForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    ids = torch.randint(3, TEXT["vocab_size"], (2, 17))
    expected = reference_logits(tmp_path / "llm", ids)
    first = len(AutoTokenizer.from_pretrained(tmp_path / "llm"))
    kept = [row for row in range(config.vocab_size) if row not in range(first, first + 3)]
    assert torch.equal(model.eval()(input_ids=ids).logits[..., kept], expected[..., kept])
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings.data_ptr() == head.data_ptr()) == bool(config.tie_word_embeddings)

    # The three tokens: next to the old vocabulary, each row the mean of all rows before.
    assert model.config.video_token_id == first and model.config.video_end_token_id == first + 2
    for table in (embeddings, head):
        for row in range(first, first + 3):
            torch.testing.assert_close(table[row], table[:row].mean(0))
    assert len(embeddings) == max(config.vocab_size, first + 3)


def test_tokenizer_that_has_the_tokens_keeps_their_rows(parts, tmp_path):
    tokenizer = tiny_tokenizer(video_tokens=True)
    save_tiny_llm(tmp_path / "llm", text_config=tiny_text_config())
    tokenizer.save_pretrained(tmp_path / "llm")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").get_input_embeddings().weight
    out = assemble(parts[0], tmp_path / "llm", tmp_path / "out", **METHOD)
    model = LongVLMForConditionalGeneration.from_pretrained(out)
    assert torch.equal(model.get_input_embeddings().weight, own)


def test_chat_template_end_tokens_and_padding_are_the_language_model_s(parts, tmp_path):
    save_tiny_llm(tmp_path / "llm", chat_template="<{{ messages[0].content }}>", pad_token_id=None)
    GenerationConfig(eos_token_id=[2, 100], bos_token_id=1).save_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "llm")

    out = assemble(parts[0], tmp_path / "llm", tmp_path / "out", **METHOD)
    model = LongVLMForConditionalGeneration.from_pretrained(out)
    processor = LongVLMProcessor.from_pretrained(out)
    assert model.generation_config.eos_token_id == [2, 100]
    assert processor.tokenizer.pad_token == "</s>" and model.generation_config.pad_token_id == 2
    assert processor.tokenizer.padding_side == "left"
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    assert "<Hi>" in str(prompt) or "<Hi>" in processor.decode(prompt[0])


def test_weights_are_taken_over_and_not_copied(parts):
    vision, language = load_vision(parts[0]), load_language(parts[1])
    llm = language.model
    model, _ = join(vision, language, **METHOD)
    assert model.model.vision_tower is vision.model
    assert model.model.language_model is llm.base_model
    assert model.lm_head is llm.lm_head


def test_dtype_is_the_language_model_s_or_the_one_asked_for(parts, tmp_path):
    AutoModelForCausalLM.from_pretrained(parts[1]).to(torch.bfloat16).save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(parts[1]).save_pretrained(tmp_path / "llm")
    own = assemble(parts[0], tmp_path / "llm", tmp_path / "own", **METHOD)
    asked = assemble(parts[0], tmp_path / "llm", tmp_path / "asked", dtype="float32", **METHOD)
    for folder, dtype in ((own, torch.bfloat16), (asked, torch.float32)):
        model = LongVLMForConditionalGeneration.from_pretrained(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_another_frame_size_than_the_encoder_s(parts, tmp_path):
    out = assemble(parts[0], parts[1], tmp_path / "out", image_size=84, **METHOD)
    model = LongVLMForConditionalGeneration.from_pretrained(out)
    processor = LongVLMProcessor.from_pretrained(out)
    assert model.config.patches_per_frame == processor.patches_per_frame == 36
    inputs = processor(text="<vid_patch>What?", videos=[video_frames()], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape[-2:] == (84, 84)
    assert torch.isfinite(model(**inputs).logits).all()


def test_same_seed_same_checkpoint(parts, tmp_path):
    config = tiny_vision_config().to_dict()
    made = [
        assemble(None, parts[1], tmp_path / str(i), vision_config=config, seed=seed, **METHOD)
        for i, seed in enumerate((3, 3, 4))
    ]
    first, same, other = (LongVLMForConditionalGeneration.from_pretrained(folder).state_dict() for folder in made)
    assert all(torch.equal(first[name], same[name]) for name in first)
    different = {name for name in first if not torch.equal(first[name], other[name])}
    assert "model.multi_modal_projector.linear_1.weight" in different
    assert any(name.startswith("model.vision_tower.") for name in different)
    assert not any(name.startswith(("model.language_model.", "lm_head.")) for name in different)


def test_untrained_encoder_is_written_down_as_such(parts, tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(tiny_vision_config().to_dict()))
    out = assemble(None, parts[1], tmp_path / "out", vision_config=path, **METHOD)
    assert json.loads((out / "config.json").read_text())["untrained_parts"] == [
        "vision_tower",
        "multi_modal_projector",
    ]


def test_no_path_of_this_machine_is_written(parts, tmp_path):
    out = assemble(*parts, tmp_path / "out", **METHOD)
    for file in out.glob("*.json"):
        assert str(tmp_path.parent) not in file.read_text(), file.name


class TestRefusals:
    def test_head_that_does_more_than_a_linear_layer(self, parts, tmp_path):
        config = BertConfig(**TEXT, is_decoder=True, pad_token_id=0)
        save_tiny_llm(tmp_path / "llm", text_config=config)
        with pytest.raises(ValueError, match="BertLMHeadModel"):
            assemble(parts[0], tmp_path / "llm", tmp_path / "out", **METHOD)
        assert not (tmp_path / "out").exists()

    def test_logits_that_differ(self, parts, tmp_path, monkeypatch):
        from longvlm import LongVLMForConditionalGeneration as model_class

        own = model_class._logits
        monkeypatch.setattr(model_class, "_logits", lambda self, hidden: own(self, hidden) * 1.01)
        with pytest.raises(ValueError, match="LlamaForCausalLM does more than a linear layer"):
            assemble(*parts, tmp_path / "out", **METHOD)
        assert list(tmp_path.iterdir()) == []

    def test_language_model_as_vision_encoder(self, parts, tmp_path):
        with pytest.raises(ValueError, match="not a vision encoder"):
            assemble(parts[1], parts[1], tmp_path / "out")

    def test_vision_encoder_as_language_model(self, parts, tmp_path):
        with pytest.raises(ValueError, match="not a plain language model"):
            assemble(parts[0], parts[0], tmp_path / "out")

    def test_encoder_without_all_its_weights(self, parts, tmp_path):
        from safetensors.torch import load_file, save_file

        vision_folder("clip", tmp_path / "clip")
        weights = load_file(tmp_path / "clip" / "model.safetensors")
        name = next(name for name in weights if "vision" in name and "fc1.weight" in name)
        del weights[name]
        save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"is missing 1 weights of CLIPVisionModel, for example .*fc1\.weight"):
            assemble(tmp_path / "clip", parts[1], tmp_path / "out")

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"hidden_size": 64}, "model_type"),
            ({"model_type": "telepathy"}, "telepathy"),
        ],
    )
    def test_vision_config(self, parts, tmp_path, config, says):
        with pytest.raises(ValueError, match=says):
            assemble(None, parts[1], tmp_path / "out", vision_config=config)

    def test_neither_or_both_encoders(self, parts, tmp_path):
        for vision, config in ((None, None), (parts[0], {"model_type": "clip_vision_model"})):
            with pytest.raises(ValueError, match="give either `vision` or `vision_config`"):
                assemble(vision, parts[1], tmp_path / "out", vision_config=config)

    def test_method_that_does_not_fit_the_encoder(self, parts, tmp_path):
        with pytest.raises(ValueError, match="num_global_layers"):
            assemble(*parts, tmp_path / "out", num_global_layers=9)
        assert list(tmp_path.iterdir()) == []


class TestOutputFolder:
    def test_full_folder_is_kept_unless_told_otherwise(self, parts, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious.txt").write_text("keep")
        with pytest.raises(ValueError, match="`overwrite`"):
            assemble(*parts, out, **METHOD)
        assert [file.name for file in out.iterdir()] == ["precious.txt"]
        assemble(*parts, out, overwrite=True, **METHOD)
        assert (out / "config.json").exists() and not (out / "precious.txt").exists()
        assert list(tmp_path.iterdir()) == [out]

    def test_nothing_is_left_of_a_failed_run(self, tmp_path):
        out = tmp_path / "new" / "out"
        with pytest.raises(RuntimeError, match="half-way"), output_folder(out) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError("half-way")
        assert list((tmp_path / "new").iterdir()) == []

    def test_old_folder_survives_a_failed_overwrite(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").touch()
        with pytest.raises(RuntimeError), output_folder(out, overwrite=True):
            raise RuntimeError("half-way")
        assert [file.name for file in out.iterdir()] == ["old"]

    def test_files_may_be_read_by_others_as_any_new_file(self, parts, tmp_path):
        out = assemble(*parts, tmp_path / "out", **METHOD)
        (tmp_path / "any").touch()
        modes = {file.stat().st_mode for file in out.iterdir()}
        assert modes == {(tmp_path / "any").stat().st_mode}


def test_every_method_option_has_a_flag(parts, tmp_path, monkeypatch, capsys):
    flags = {
        "--frames-per-segment": 4,
        "--tokens-per-segment": 20,
        "--num-global-layers": 1,
        "--vision-feature-layer": -1,
        "--merge-schedule": "32,8,4",
        "--merge-similarity": "per_head",
        "--merge-num-heads": 8,
        "--merge-order": "time",
        "--global-placement": "suffix",
        "--projector-type": "mlp2x_gelu",
        "--vision-chunk-frames": 3,
        "--preset": "original",
        "--num-frames": 12,
        "--dtype": "float32",
        "--seed": 5,
    }
    out = tmp_path / "out"
    arguments = ["longvlm", "assemble", "--vision", parts[0], "--language", parts[1], "--out", out]
    arguments += [part for pair in flags.items() for part in pair]
    monkeypatch.setattr(sys, "argv", [str(part) for part in arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{out}\n"

    config = LongVLMForConditionalGeneration.from_pretrained(out).config
    for flag in list(flags)[:11]:
        name = flag.removeprefix("--").replace("-", "_")
        expected = [32, 8, 4] if name == "merge_schedule" else flags[flag]
        assert getattr(config, name) == expected, flag
    video_processor = LongVLMProcessor.from_pretrained(out).video_processor
    assert video_processor.num_frames == 12
    assert video_processor.do_center_crop is False


def test_special_tokens_are_those_of_the_original():
    assert VIDEO_TOKENS == ("<vid_patch>", "<vid_start>", "<vid_end>")
