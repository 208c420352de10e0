"""LLaVA checkpoints of every layout -> a LongVLM whose projector and language model are theirs.

Promises: text alone gives their logits, features give their projector's output, the preprocessing and the layer are
theirs, no global tokens unless asked for; deltas, and what cannot be taken over, are refused in one line. All with
tiny random checkpoints, written as transformers and as the original repositories write theirs.
"""

import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    SiglipVisionConfig,
    pipeline,
)

from longvlm import LongVLMForConditionalGeneration, LongVLMProcessor
from longvlm.conversion.assemble import VIDEO_TOKENS
from longvlm.conversion.llava import convert_llava
from longvlm_cli import app as cli
from tests.helpers.tiny_models import tiny_text_config, tiny_tokenizer, tiny_vision_config
from tests.helpers.tokenizers_for_tests import FIXTURES
from tests.helpers.video_files import write_video

METHOD = {"frames_per_segment": 4, "tokens_per_segment": 6}
VOCABULARY = 387  # of the fixture's tokenizer: 384 pieces and LLaVA's three image tokens
IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
QUESTION = torch.tensor([[1, 70, 81, 99, 200, 17, 5, 42]])


def randomize(model):
    """Norms and biases that are not what they start from; norms stay around 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_clip(folder, **changes):
    tower = randomize(CLIPVisionModel(tiny_vision_config(**changes)))
    tower.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return tower


def image_processor():
    return CLIPImageProcessor(
        size={"shortest_edge": 60}, crop_size={"height": 56, "width": 56}, image_mean=[0.5, 0.4, 0.3]
    )


def transformers_llava(folder, *, nesting="files", text_config=None, vision_config=None, **options):
    """As on the Hub under llava-hf; `nesting`: names as in files, or as in memory since 4.52."""
    text_config = text_config or tiny_text_config(vocab_size=len(tiny_tokenizer(video_tokens=False)) + 20)
    config = LlavaConfig(
        vision_config=vision_config or tiny_vision_config(), text_config=text_config, image_token_index=259, **options
    )
    model = randomize(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(
        video_tokens=False, chat_template="{% for p in messages[0].content %}{{ p.type }}{% endfor %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    file = folder / "model.safetensors"
    if nesting == "memory":
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, file, metadata={"format": "pt"})
    elif nesting == "older":
        state = load_file(file)
        state = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in state.items()}
        state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        file.unlink()
        torch.save(state, folder / "pytorch_model.bin")
    return model


def original_llava(
    folder, clip, *, kind="llava", projector="mlp2x_gelu", file_format="bin", tokens=IMAGE_TOKENS, rows=None, **changes
):
    """As the original repositories write it; returns the language model and the projector."""
    rows = rows or 384 + len(tokens)
    llm = randomize(LlamaForCausalLM(tiny_text_config(vocab_size=rows, num_key_value_heads=4)))
    layers = [nn.Linear(64, 32)] if projector == "linear" else [nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32)]
    state = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    whole = layers[0] if projector == "linear" else nn.Sequential(*layers)
    state |= {f"model.mm_projector.{name}": tensor.detach() for name, tensor in whole.state_dict().items()}
    folder.mkdir()
    write_weights(folder, state, file_format)
    config = {
        **{key: value for key, value in llm.config.to_dict().items() if key not in ("rope_parameters", "dtype")},
        "architectures": ["VideoChatGPTLlamaForCausalLM" if kind == "VideoChatGPT" else "LlavaLlamaForCausalLM"],
        "model_type": kind,
        "torch_dtype": "float16",
        "mm_hidden_size": 64,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(clip),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "rope_theta": 5000.0,
        "transformers_version": "4.31.0",
        **changes,
    }
    if projector != "linear":
        config.setdefault("mm_projector_type", projector)
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))  # Vicuna's: transformers warns of it
    shutil.copytree(FIXTURES / "original_tokenizer", folder, dirs_exist_ok=True)
    (folder / "added_tokens.json").write_text(json.dumps({token: 384 + i for i, token in enumerate(tokens)}))
    llm.config.rope_parameters["rope_theta"] = 5000.0
    reference = LlamaForCausalLM(llm.config).eval()  # the frequencies are made when the model is
    reference.load_state_dict(llm.state_dict())
    return reference, whole


def write_weights(folder, state, file_format):
    if file_format == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return
    suffix = "safetensors" if "safetensors" in file_format else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        write = save_file if suffix == "safetensors" else torch.save
        write({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    save_clip(folder)
    return folder


@torch.no_grad()
def check_text_and_projector(out, llm, projector, ids=QUESTION):
    model, info = LongVLMForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = llm(input_ids=ids).logits
    logits = model.eval()(input_ids=ids).logits
    # Rows that were unused have become the video tokens'.
    taken = (model.config.video_token_id, model.config.video_start_token_id, model.config.video_end_token_id)
    kept = [row for row in range(expected.shape[-1]) if row not in taken]
    torch.testing.assert_close(logits[..., kept], expected[..., kept], atol=1e-5, rtol=1e-5)
    features = torch.randn(5, 64)
    torch.testing.assert_close(model.model.multi_modal_projector(features), projector(features))
    return model


class TestTransformersLayout:
    @pytest.mark.parametrize("nesting", ["files", "memory", "older"])
    def test_logits_projector_and_encoder_are_theirs(self, nesting, tmp_path):
        llava = transformers_llava(tmp_path / "llava", nesting=nesting)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        model = check_text_and_projector(out, llava, llava.model.multi_modal_projector, ids=QUESTION)
        theirs, mine = llava.model.vision_tower.state_dict(), model.model.vision_tower.state_dict()
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in theirs)

    @torch.no_grad()
    def test_a_single_frame_without_merging_is_their_picture(self, tmp_path):
        llava = transformers_llava(tmp_path / "llava", vision_feature_layer=-1)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", frames_per_segment=1, tokens_per_segment=16)
        model = LongVLMForConditionalGeneration.from_pretrained(out).eval()
        assert model.config.vision_feature_layer == -1
        pixels = torch.randn(1, 3, 56, 56)
        theirs = llava.get_image_features(pixels)
        theirs = getattr(theirs, "pooler_output", theirs)[0]
        mine = model.get_video_features(pixels[None]).pooler_output[0]
        assert mine.shape == (16, 32)
        torch.testing.assert_close(mine, theirs.reshape(16, 32), atol=1e-5, rtol=1e-5)

    def test_frames_are_prepared_as_their_pictures(self, tmp_path):
        transformers_llava(tmp_path / "llava")
        out = convert_llava(tmp_path / "llava", tmp_path / "out", video_options={"num_frames": 8}, **METHOD)
        video_processor = AutoProcessor.from_pretrained(out).video_processor
        assert video_processor.num_frames == 8 and video_processor.shortest_edge == 60
        assert list(video_processor.image_mean) == [0.5, 0.4, 0.3]
        assert dict(video_processor.size) == {"height": 56, "width": 56}

    def test_projector_without_bias(self, tmp_path):
        llava = transformers_llava(tmp_path / "llava", multimodal_projector_bias=False)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        check_text_and_projector(out, llava, llava.model.multi_modal_projector)

    def test_another_language_model(self, tmp_path):
        config = {
            name: value for name, value in tiny_text_config().to_dict().items() if name in MistralConfig().to_dict()
        }
        config = {**config, "model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
        llava = transformers_llava(tmp_path / "llava", text_config=MistralConfig(**config, sliding_window=None))
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        assert check_text_and_projector(
            out, llava, llava.model.multi_modal_projector
        ).config.text_config.model_type == ("mistral")

    def test_siglip_and_a_language_model_with_tied_embeddings(self, tmp_path):
        vision = {name: getattr(tiny_vision_config(), name) for name in ("image_size", "patch_size", "hidden_size")}
        sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision_config = SiglipVisionConfig(**vision, **sizes, vision_use_head=False)
        text_config = Qwen2Config(
            hidden_size=32, **sizes, num_key_value_heads=2, vocab_size=300, tie_word_embeddings=True
        )
        llava = transformers_llava(
            tmp_path / "llava", text_config=text_config, vision_config=vision_config, tie_word_embeddings=True
        )
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        model = check_text_and_projector(out, llava, llava.model.multi_modal_projector)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        theirs, mine = llava.model.vision_tower.state_dict(), model.model.vision_tower.state_dict()
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in theirs)

    def test_processor_saved_as_one(self, tmp_path):
        transformers_llava(tmp_path / "llava")
        for file in tmp_path.glob("llava/*processor*.json"):
            file.unlink()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
        LlavaProcessor(image_processor(), tokenizer, patch_size=14).save_pretrained(tmp_path / "llava")
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        assert list(AutoProcessor.from_pretrained(out).video_processor.image_mean) == [0.5, 0.4, 0.3]

    def test_prompt_is_vicuna_s_and_not_one_for_pictures(self, tmp_path):
        transformers_llava(tmp_path / "llava")
        processor = LongVLMProcessor.from_pretrained(convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD))
        content = [{"type": "video"}, {"type": "text", "text": "What?"}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert prompt.startswith("A chat between a curious user") and prompt.endswith("What? ASSISTANT:")

    def test_source_is_left_as_it_is(self, tmp_path):
        transformers_llava(tmp_path / "llava")
        file = tmp_path / "llava" / "model.safetensors"
        before = hashlib.sha256(file.read_bytes()).hexdigest()
        convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)  # new rows in tables that are mapped from it
        assert hashlib.sha256(file.read_bytes()).hexdigest() == before


class TestOriginalLayout:
    @pytest.mark.parametrize(
        ("kind", "projector", "file_format"),
        [
            ("llava", "mlp2x_gelu", "bin"),
            ("llava_llama", "mlp2x_gelu", "sharded bin"),
            ("llava", "linear", "sharded safetensors"),
            ("VideoChatGPT", "linear", "bin"),
        ],
    )
    def test_logits_and_projector_are_theirs(self, kind, projector, file_format, clip, tmp_path):
        llm, theirs = original_llava(tmp_path / "llava", clip, kind=kind, projector=projector, file_format=file_format)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        model = check_text_and_projector(out, llm, theirs)
        assert model.config.projector_type == projector
        assert model.config.text_config.rope_parameters["rope_theta"] == 5000.0
        assert model.config.vision_feature_layer == -2
        assert torch.equal(
            model.model.vision_tower.embeddings.class_embedding,
            CLIPVisionModel.from_pretrained(clip).embeddings.class_embedding,
        )

    def test_video_tokens_are_added_after_their_image_tokens_as_mean_rows(self, clip, tmp_path):
        llm, _ = original_llava(tmp_path / "llava", clip)
        model = LongVLMForConditionalGeneration.from_pretrained(
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        )
        tokenizer = LongVLMProcessor.from_pretrained(tmp_path / "out").tokenizer
        assert tokenizer.convert_tokens_to_ids([*IMAGE_TOKENS, *VIDEO_TOKENS]) == list(range(384, 390))
        assert (model.config.video_token_id, model.config.video_end_token_id) == (387, 389)
        for mine, own in (
            (model.get_input_embeddings(), llm.get_input_embeddings()),
            (model.get_output_embeddings(), llm.get_output_embeddings()),
        ):
            assert torch.equal(mine.weight[:387], own.weight)
            torch.testing.assert_close(mine.weight[387:], own.weight.mean(0).expand(3, -1))

    def test_video_tokens_that_are_there_keep_their_rows(self, clip, tmp_path):
        llm, _ = original_llava(
            tmp_path / "llava", clip, kind="VideoChatGPT", projector="linear", tokens=(*IMAGE_TOKENS, *VIDEO_TOKENS)
        )
        model = LongVLMForConditionalGeneration.from_pretrained(
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        )
        assert torch.equal(model.get_input_embeddings().weight, llm.get_input_embeddings().weight)
        assert model.config.video_start_token_id == 388

    def test_projector_saved_alone_with_the_rows_of_its_video_tokens(self, clip, tmp_path):
        llm, _ = original_llava(tmp_path / "llava", clip, projector="linear")
        new, table = nn.Linear(64, 32), torch.randn(390, 32)
        torch.save(
            {
                "model.mm_projector.weight": new.weight.detach(),
                "model.mm_projector.bias": new.bias.detach(),
                "model.embed_tokens.weight": table,
            },
            tmp_path / "video_chatgpt.bin",
        )
        out = convert_llava(tmp_path / "llava", tmp_path / "out", projector=tmp_path / "video_chatgpt.bin", **METHOD)
        model = check_text_and_projector(out, llm, new)
        assert torch.equal(model.get_input_embeddings().weight[387:], table[387:])

    def test_encoder_that_was_trained_along(self, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        trained = randomize(CLIPVisionModel(tiny_vision_config()))
        file = tmp_path / "llava" / "pytorch_model.bin"
        state = torch.load(file)
        prefix = "model.vision_tower.vision_tower.vision_model."
        state |= {prefix + name: tensor for name, tensor in trained.state_dict().items()}
        torch.save(state, file)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        mine = LongVLMForConditionalGeneration.from_pretrained(out).model.vision_tower.state_dict()
        assert all(torch.equal(tensor, mine[name]) for name, tensor in trained.state_dict().items())

    @pytest.mark.parametrize(
        ("legacy", "expected"),
        [(True, ["</s>", "▁", "U", "S"]), (False, ["</s>", "U", "S"]), (None, ["</s>", "▁", "U", "S"])],
    )
    def test_tokens_are_those_of_their_time(self, legacy, expected, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        file = tmp_path / "llava" / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config.pop("legacy", None)
        file.write_text(json.dumps(config if legacy is None else {**config, "legacy": legacy}))
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        tokens = LongVLMProcessor.from_pretrained(out).tokenizer.tokenize("</s>US")
        assert tokens == expected

    def test_delta_is_added_to_its_base(self, clip, tmp_path):
        llm, projector = original_llava(tmp_path / "whole", clip, projector="linear")
        base = randomize(LlamaForCausalLM(tiny_text_config(vocab_size=384, num_key_value_heads=4)))
        base.save_pretrained(tmp_path / "base")
        LlamaTokenizer.from_pretrained(FIXTURES / "original_tokenizer").save_pretrained(tmp_path / "base")
        shutil.copytree(tmp_path / "whole", tmp_path / "delta")
        state = torch.load(tmp_path / "whole" / "pytorch_model.bin")
        for name, tensor in base.state_dict().items():
            state[name][: len(tensor)] -= tensor
        torch.save(state, tmp_path / "delta" / "pytorch_model.bin")

        with pytest.raises(ValueError, match=r"delta is a delta, not a whole model; give the LLaMA .* as `base`"):
            convert_llava(tmp_path / "delta", tmp_path / "out", **METHOD)
        with pytest.raises(ValueError, match="whole is a whole model, not a delta; leave `base` out"):
            convert_llava(tmp_path / "whole", tmp_path / "out", base=tmp_path / "base", **METHOD)
        out = convert_llava(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base", **METHOD)
        check_text_and_projector(out, llm, projector)


class TestChoices:
    def test_no_global_tokens_unless_asked_for(self, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        asked = convert_llava(
            tmp_path / "llava", tmp_path / "asked", global_placement="prefix", num_global_layers=2, **METHOD
        )
        for folder, tokens in ((out, 12), (asked, 14)):
            model = LongVLMForConditionalGeneration.from_pretrained(folder)
            assert model.config.num_video_tokens(8) == tokens
            assert LongVLMProcessor.from_pretrained(folder).num_video_tokens(8) == tokens

    def test_nothing_is_said_to_be_untrained(self, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        assert json.loads((out / "config.json").read_text())["untrained_parts"] == []

    def test_dtype(self, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        out = convert_llava(tmp_path / "llava", tmp_path / "out", dtype="bfloat16", **METHOD)
        model = LongVLMForConditionalGeneration.from_pretrained(out)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_another_vision_encoder(self, clip, tmp_path):
        original_llava(tmp_path / "llava", "openai/clip-vit-large-patch14")
        with pytest.raises(ValueError, match=r"names openai/clip-vit-large-patch14 .* cannot be loaded .*as `vision`"):
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        convert_llava(tmp_path / "llava", tmp_path / "out", vision=clip, **METHOD)
        save_clip(tmp_path / "wide", hidden_size=96)
        with pytest.raises(ValueError, match="takes features of width 64, but wide gives 96"):
            convert_llava(tmp_path / "llava", tmp_path / "other", vision=tmp_path / "wide", **METHOD)

    def test_no_path_of_this_machine_is_written(self, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        for file in convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD).glob("*.json"):
            assert str(clip.parent) not in file.read_text() and str(tmp_path) not in file.read_text(), file.name


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"model_type": "llava_next", "vision_config": {}}, "is a llava_next model"),
            ({"model_type": "llava_mpt"}, "is a llava_mpt model"),
            ({"mm_projector_type": "mlp3x_gelu"}, 'projector of type "mlp3x_gelu"'),
            ({"num_hidden_layers": 3}, r"is missing \d+ weights of LlamaForCausalLM, for example .*layers\.2"),
            ({"num_hidden_layers": 1}, "weights that LlamaForCausalLM has no place for"),
            (
                {"intermediate_size": 96},
                "down_proj.weight of LlamaForCausalLM does not have the shape that its config.json says",
            ),
        ],
    )
    def test_configuration(self, changes, says, clip, tmp_path):
        original_llava(tmp_path / "llava", clip, **changes)
        with pytest.raises(ValueError, match=says) as error:
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"vision_feature_layer": [-2, -1]}, r"features of layers \[-2, -1\]"),
            ({"projector_hidden_act": "relu"}, "projector with relu"),
        ],
    )
    def test_transformers_layout(self, options, says, tmp_path):
        transformers_llava(tmp_path / "llava", **options)
        with pytest.raises(ValueError, match=says):
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)

    def test_folder_without_what_is_needed(self, clip, tmp_path):
        original_llava(tmp_path / "llava", clip, file_format="sharded bin")
        (tmp_path / "llava" / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(ValueError, match=r"is missing pytorch_model-00002-of-00002\.bin"):
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        index = tmp_path / "llava" / "pytorch_model.bin.index.json"
        for content, says in (
            ("{}", "is not an index of shards"),
            ("", "is not an index of shards"),
            (None, "contains no weights"),
        ):
            index.unlink() if content is None else index.write_text(content)
            with pytest.raises(ValueError, match=says):
                convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        (tmp_path / "llava" / "config.json").unlink()
        with pytest.raises(ValueError, match=r"llava has no config\.json"):
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda state: {n: t for n, t in state.items() if "mm_projector" not in n}, "contains no projector"),
            (lambda state: {n: t for n, t in state.items() if "mm_projector" in n}, "contains no language model"),
            (
                lambda state: {**state, "model.image_newline": torch.ones(3)},
                r"holds model\.image_newline, which a LongVLM has no place for",
            ),
            (lambda state: {**state, "model.mm_projector.0.weight": torch.ones(8, 64)}, "8 channels"),
        ],
    )
    def test_weights(self, change, says, clip, tmp_path):
        original_llava(tmp_path / "llava", clip)
        file = tmp_path / "llava" / "pytorch_model.bin"
        torch.save(change(torch.load(file)), file)
        with pytest.raises(ValueError, match=says):
            convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
        assert not (tmp_path / "out").exists()


def test_command_pipeline_and_ask(clip, tmp_path, monkeypatch, capsys):
    def longvlm(*arguments):
        monkeypatch.setattr(sys, "argv", ["longvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    original_llava(tmp_path / "llava", clip, max_position_embeddings=4096)
    out = tmp_path / "out"
    code, printed, err = longvlm(
        "convert", "llava", tmp_path / "llava", "--out", out, "--num-frames", 8, "--frames-per-segment", 4
    )
    assert (code, printed) == (0, f"{out}\n"), err
    config = LongVLMForConditionalGeneration.from_pretrained(out).config
    assert (config.frames_per_segment, config.tokens_per_segment, config.global_placement) == (4, 30, "none")

    video = write_video(tmp_path / "square.mp4", 24, rate=8)
    pipe = pipeline("video-question-answering", model=str(out))
    expected = pipe(video=str(video), question="What moves?", max_new_tokens=5, do_sample=False)["answer"]
    code, answer, err = longvlm("ask", video, "What moves?", "--model", out, "--max-new-tokens", 5)
    assert (code, answer) == (0, f"{expected}\n")
    assert "untrained" not in err

    code, printed, err = longvlm("convert", "llava", clip, "--out", tmp_path / "other", "-q")
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert err.startswith("longvlm: error: clip is a clip_vision_model model; expected a LLaVA-1.5")


def test_mistral_of_the_original_repositories(clip, tmp_path):
    original_llava(tmp_path / "llava", clip)
    values = {key: getattr(tiny_text_config(), key) for key in ("hidden_size", "intermediate_size")}
    config = MistralConfig(
        **values, vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    llm = randomize(MistralForCausalLM(config))
    file = tmp_path / "llava" / "pytorch_model.bin"
    projector = {name: tensor for name, tensor in torch.load(file).items() if "mm_projector" in name}
    torch.save({**llm.state_dict(), **projector}, file)
    path = tmp_path / "llava" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config.to_dict(), "model_type": "llava_mistral"}))
    model = LongVLMForConditionalGeneration.from_pretrained(
        convert_llava(tmp_path / "llava", tmp_path / "out", **METHOD)
    )
    torch.testing.assert_close(model(input_ids=QUESTION).logits[..., :VOCABULARY], llm(input_ids=QUESTION).logits)
