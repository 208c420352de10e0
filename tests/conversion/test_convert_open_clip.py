"""open_clip -> CLIPVisionModel: every hidden state is open_clip's own, and so are activation and preprocessing.

The towers have the heads, MLP ratio and activation of the real ones, two layers, and (but for one) a small width.
Promises besides: a tag decides on activation and preprocessing, files of every kind are read and none is run, what
cannot be represented is refused by name, `assemble` takes a tower in one go.
"""

import copy
import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel, pipeline

from longvlm import LongVLMForConditionalGeneration, LongVLMProcessor
from longvlm.conversion.assemble import assemble
from longvlm.conversion.openclip_vision import convert_open_clip, load_open_clip
from longvlm.conversion.vision_encoder import load_vision
from longvlm_cli import app as cli
from tests.helpers.tiny_models import save_tiny_llm
from tests.helpers.video_files import write_video

open_clip = pytest.importorskip("open_clip")

METHOD = {"num_global_layers": 2, "frames_per_segment": 4, "tokens_per_segment": 6}
FAMILIES = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14"]
FAMILIES += ["ViT-bigG-14", "ViT-bigG-14-quickgelu", "ViT-M-16-alt"]


@pytest.fixture(scope="module")
def register(tmp_path_factory):
    """Makes open_clip know a small model like one of its own; returns its name."""
    folder = tmp_path_factory.mktemp("configs")

    def make(like, *, name=None, full_width=False, quick_gelu=None, **changes):
        config = copy.deepcopy(open_clip.get_model_config(like))
        vision = config["vision_cfg"]
        vision |= {"layers": 2, "image_size": vision["patch_size"] * (5 if "336" in like else 4)}
        if not full_width:
            vision["width"] = 4 * vision.get("head_width", 64)
        vision |= changes
        config["embed_dim"] = 48
        config["text_cfg"] = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 99, "context_length": 8}
        for key in ("custom_text", "multimodal_cfg"):
            config.pop(key, None)
        if quick_gelu is not None:
            config["quick_gelu"] = quick_gelu
        name = name or f"tiny-{like}"
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        return name

    return make


def random_model(name):
    """open_clip's own model; norms and biases are not what they start from."""
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        for key, parameter in model.visual.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (1 if "gamma" in key else 0.2))
    return model


def save(model, path):
    torch.save(model.state_dict(), path)
    return path


@torch.no_grad()
def hidden_states_of(model, pixels):
    """What open_clip computes: after `ln_pre`, after each block, and the normed [CLS] token."""
    states, pooled = [], []
    hooks = [model.visual.ln_post.register_forward_hook(lambda module, inputs, output: pooled.append(output))]
    for module in (model.visual.ln_pre, *model.visual.transformer.resblocks):
        hooks.append(module.register_forward_hook(lambda module, inputs, output: states.append(output)))
    model.visual(pixels)
    for hook in hooks:
        hook.remove()
    return states, pooled[0][:, 0] if pooled[0].ndim == 3 else pooled[0]


@torch.no_grad()
def largest_difference(tower, model):
    side = tower.config.image_size
    pixels = torch.randn(2, 3, side, side)
    outputs = tower(pixels, output_hidden_states=True)
    states, pooled = hidden_states_of(model, pixels)
    pairs = [*zip(outputs.hidden_states, states, strict=True), (outputs.pooler_output, pooled)]
    assert states[-1].abs().max() > 1
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hidden_state_is_open_clip_s(family, register, tmp_path):
    name = register(family)
    model = random_model(name)
    convert_open_clip(name, tmp_path / "vit", pretrained=save(model, tmp_path / "weights.pt"))
    tower = AutoModel.from_pretrained(tmp_path / "vit").eval()
    assert type(tower) is CLIPVisionModel
    assert largest_difference(tower, model) <= 1e-4
    # Nearly the same numbers come out with the wrong one.
    assert tower.config.hidden_act == ("quick_gelu" if "quickgelu" in family else "gelu")
    assert tower.config.num_attention_heads == 4


def test_real_width_of_the_largest(register, tmp_path):
    name = register("ViT-bigG-14", name="wide-bigG", full_width=True, layers=1)
    model = random_model(name)
    part = load_open_clip(name, save(model, tmp_path / "weights.pt"))
    config = part.model.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (1664, 8192, 16)
    assert largest_difference(part.model, model) <= 1e-4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm_kwargs": {"eps": 1e-3}}, {"layer_norm_eps": 1e-3}),
        ({"act_kwargs": {"approximate": "tanh"}}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"pos_embed_type": "sin_cos_2d", "patch_dropout": 0.5, "output_tokens": True}, {}),
        ({"final_ln_after_pool": True}, {}),
        ({"ls_init_value": 0.5}, {}),
    ],
)
def test_options_that_can_be_represented(changes, says, register, tmp_path):
    name = register("ViT-B-32", name="tiny-options", **changes)
    model = random_model(name)
    tower = load_open_clip(name, save(model, tmp_path / "weights.pt")).model
    assert largest_difference(tower, model) <= 1e-4
    assert {key: getattr(tower.config, key) for key in says} == says


class TestTags:
    @pytest.fixture
    def publish(self, register, monkeypatch, tmp_path):
        """Publishes a small model like ViT-B-32 under a tag, with that tag's real description."""

        def make(like, tag, quick_gelu, name="tiny-ViT-B-32"):
            register("ViT-B-32", name=name)
            reference = random_model(register("ViT-B-32", name=f"{name}-reference", quick_gelu=quick_gelu))
            description = open_clip.get_pretrained_cfg(like, tag)
            assert description
            monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {tag: description})
            file = save(reference, tmp_path / "downloaded.pt")
            monkeypatch.setattr(open_clip, "download_pretrained", lambda asked: str(file) if asked else None)
            return name, reference

        return make

    @pytest.mark.parametrize("tag", ["openai", "metaclip_400m"])
    def test_tag_brings_quickgelu_to_a_plain_name(self, tag, publish, tmp_path):
        name, reference = publish("ViT-B-32", tag, quick_gelu=True)
        convert_open_clip(name, tmp_path / "vit", pretrained=tag)
        tower = AutoModel.from_pretrained(tmp_path / "vit").eval()
        assert tower.config.hidden_act == "quick_gelu"
        assert largest_difference(tower, reference) <= 1e-4

    def test_tag_without_quickgelu(self, publish):
        name, reference = publish("ViT-B-32", "laion2b_s34b_b79k", quick_gelu=False)
        tower = load_open_clip(name, "laion2b_s34b_b79k").model
        assert tower.config.hidden_act == "gelu"
        assert largest_difference(tower, reference) <= 1e-4

    def test_mean_and_deviation_are_the_tag_s(self, publish):
        name, _ = publish("ViT-L-14", "laion2b_s32b_b82k", quick_gelu=False)
        part = load_open_clip(name, "laion2b_s32b_b82k")
        assert part.image_options["image_mean"] == [0.5, 0.5, 0.5] == part.image_options["image_std"]
        assert part.name == f"open_clip:{name}/laion2b_s32b_b82k"

    def test_download_that_fails_is_one_line(self):
        says = r"open_clip:ViT-L-14/openai cannot be downloaded .*; give a local file"
        with pytest.raises(OSError, match=says) as error:
            load_open_clip("ViT-L-14", "openai")  # the tests have no network
        assert "\n" not in str(error.value)


class TestPreprocessing:
    @pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_pixel_values_are_those_of_open_clip_s_transform(self, resize_mode, interpolation, register, tmp_path):
        name = register("ViT-B-32")
        model = random_model(name)
        options = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": interpolation}
        options["resize_mode"] = resize_mode
        file = save(model, tmp_path / "open_clip_pytorch_model.bin")
        description = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": options}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
        convert_open_clip(name, tmp_path / "vit", pretrained=file)

        from open_clip.transform import PreprocessCfg, image_transform_v2

        own = image_transform_v2(PreprocessCfg(size=128, **options), is_train=False)
        picture = smooth_picture(width=300, height=200)
        expected = own(picture)
        mine = AutoImageProcessor.from_pretrained(tmp_path / "vit")(picture, return_tensors="pt")["pixel_values"][0]
        assert mine.shape == expected.shape
        deviation = torch.tensor(options["std"])[:, None, None]
        assert ((mine - expected) * deviation).abs().max() < 1.01 / 255

        llm = save_tiny_llm(tmp_path / "llm")
        out = assemble(f"open_clip:{name}/{file}", llm, tmp_path / "out", **METHOD)
        processor = LongVLMProcessor.from_pretrained(out)
        frames = processor.video_processor([[picture]], return_tensors="pt", do_sample_frames=False)
        frame = frames["pixel_values_videos"][0, 0]
        assert ((frame - expected) * deviation).abs().max() < 1.01 / 255

    def test_a_file_alone_has_openai_s(self, register, tmp_path):
        name = register("ViT-B-32")
        own = open_clip.create_model(name)
        part = load_open_clip(name, save(own, tmp_path / "weights.pt"))
        assert part.image_options["image_mean"] == list(own.visual.preprocess_cfg["mean"])
        assert part.image_options["size"] == {"shortest_edge": 128}


def smooth_picture(width, height):
    """Waves of many lengths: hard edges of noise would only compare how two libraries round."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + 7 * c) + y / (23 - 5 * c)) + np.cos(x * y / (900 + 500 * c)) for c in range(3)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


class TestFiles:
    @pytest.fixture
    def model(self, register):
        return random_model(register("ViT-B-32"))

    @pytest.mark.parametrize("kind", ["pt", "legacy.pt", "training.pt", "safetensors"])
    def test_every_kind_of_file(self, kind, model, tmp_path):
        file, state = tmp_path / f"weights.{kind}", {k: v.contiguous() for k, v in model.state_dict().items()}
        if kind == "safetensors":
            save_file(state, file)
        elif kind == "training.pt":
            wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
            torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}}}, file)
        else:
            torch.save(state, file, _use_new_zipfile_serialization=kind == "pt")
        assert largest_difference(load_open_clip("tiny-ViT-B-32", file).model, model) <= 1e-4

    @pytest.mark.parametrize("file_name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
    def test_folder_as_on_the_hub_says_how_it_was_trained(self, file_name, register, tmp_path):
        reference = random_model(register("ViT-B-32-quickgelu"))
        state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
        (save_file if "safetensors" in file_name else torch.save)(state, tmp_path / file_name)
        config = open_clip.get_model_config("tiny-ViT-B-32-quickgelu")
        description = {"model_cfg": config, "preprocess_cfg": {"std": [0.1, 0.2, 0.3]}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
        for model in (register("ViT-B-32"), "a name of its own"):
            part = load_open_clip(model, tmp_path)
            assert part.image_options["image_std"] == [0.1, 0.2, 0.3]
            assert part.model.config.hidden_act == "quick_gelu"
            assert largest_difference(part.model, reference) <= 1e-4
        (tmp_path / "open_clip_config.json").write_text("{}")
        with pytest.raises(ValueError, match="is not a description by open_clip"):
            load_open_clip("tiny-ViT-B-32", tmp_path)

    def test_half_precision_stays_and_mixed_becomes_single(self, model, tmp_path):
        half = load_open_clip("tiny-ViT-B-32", save(copy.deepcopy(model).half(), tmp_path / "half.pt")).model
        mixed = copy.deepcopy(model)
        mixed.visual.conv1.half()
        single = load_open_clip("tiny-ViT-B-32", save(mixed, tmp_path / "mixed.pt")).model
        asked = load_open_clip("tiny-ViT-B-32", tmp_path / "mixed.pt", dtype=torch.bfloat16).model
        assert (half.dtype, single.dtype, asked.dtype) == (torch.float16, torch.float32, torch.bfloat16)

    def test_torchscript_only_if_allowed_and_then_with_openai_s_activation(self, model, register, tmp_path):
        class Archive(torch.nn.Module):
            def __init__(self, visual):
                super().__init__()
                self.visual = visual
                for name in ("input_resolution", "context_length", "vocab_size"):
                    self.register_buffer(name, torch.tensor(1))

            def forward(self, pixels):
                return self.visual(pixels)

        reference = random_model(register("ViT-B-32-quickgelu"))
        file = tmp_path / "ViT-B-32.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and old archives are all the same there
            traced = torch.jit.trace(Archive(reference.visual), torch.randn(1, 3, 128, 128), check_trace=False)
        traced.save(file)
        with pytest.raises(ValueError, match=r"is a TorchScript archive, which can run code.*`allow_torchscript`"):
            load_open_clip("tiny-ViT-B-32", file)
        tower = load_open_clip("tiny-ViT-B-32", file, allow_torchscript=True).model
        assert tower.config.hidden_act == "quick_gelu"
        assert largest_difference(tower, reference) <= 1e-4

    def test_pickle_with_code_is_not_run(self, model, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        for legacy in (False, True):
            state = {**model.state_dict(), "args": Bomb()}
            torch.save(state, tmp_path / "bomb.pt", _use_new_zipfile_serialization=not legacy)
            with pytest.raises(ValueError, match="holds more than tensors"):
                load_open_clip("tiny-ViT-B-32", tmp_path / "bomb.pt")
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut"])
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_broken_file_is_one_line(self, content, suffix, register, tmp_path):
        file = tmp_path / f"broken{suffix}"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file)) as error:
            load_open_clip(register("ViT-B-32"), file)
        assert "\n" not in str(error.value)


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "tag", "says"),
        [
            ("RN50", "openai", "ResNet"),
            ("coca_ViT-L-14", "laion2b_s13b_b90k", "attentional pooling"),
            ("ViT-L-14-CLIPA", "datacomp1b", "no_ln_pre"),
            ("ViT-B-16-SigLIP", "webli", "timm's vit_base_patch16_siglip_224"),
            ("EVA02-B-16", "merged2b_s8b_b131k", "timm's eva02"),
            ("MobileCLIP-S1", "datacompdr", "timm's fastvit"),
            ("convnext_base", "laion400m_s13b_b51k", "timm's convnext"),
            ("ViTamin-S", "datacomp1b", "timm's vitamin"),
        ],
    )
    def test_by_name_and_before_anything_is_downloaded(self, model, tag, says, monkeypatch, tmp_path):
        monkeypatch.setattr(open_clip, "download_pretrained", lambda *a, **k: pytest.fail("downloaded"))
        with pytest.raises(ValueError, match=f"open_clip:{model}/{tag}.*{says}.*cannot represent it"):
            convert_open_clip(model, tmp_path / "vit", pretrained=tag)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"pool_type": "avg"},
            {"qk_norm": True, "block_type": "custom"},
            {"scale_fc": True},
            {"image_size": [64, 96]},
            {"patch_size": [32, 16], "image_size": 128},
            {"norm_kwargs": {"elementwise_affine": False}},
        ],
    )
    def test_options_without_a_place(self, changes, register, tmp_path):
        name = register("ViT-B-32", name="tiny-refused", **changes)
        file = save(open_clip.create_model(name), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=r"tiny-refused.*cannot represent it"):
            load_open_clip(name, file)

    @pytest.mark.parametrize(
        ("like", "changes", "says"),
        [
            ("coca_ViT-B-32", {}, "attentional pooling"),
            ("ViT-B-32", {"no_ln_pre": True}, "no layer norm before its layers"),
            ("ViT-B-32", {"qk_norm": True, "scale_attn_inner": True, "block_type": "custom"}, "without a place"),
        ],
    )
    def test_file_of_another_family_than_its_name_says(self, like, changes, says, register, tmp_path):
        other = register(like, name="tiny-other", **changes)
        file = save(open_clip.create_model(other), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=says):
            load_open_clip(register("ViT-B-32"), file)

    @pytest.mark.parametrize("changes", [{"layers": 3}, {"layers": 1}, {"image_size": 160}, {"width": 512}])
    def test_file_that_does_not_fit_its_name(self, changes, register, tmp_path):
        file = save(open_clip.create_model(register("ViT-B-32", name="tiny-misfit", **changes)), tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"does not fit its architecture: .* has shape .*, expected"):
            load_open_clip(register("ViT-B-32"), file)

    def test_padding_to_a_square(self, register, tmp_path):
        name = register("ViT-B-32")
        file = save(open_clip.create_model(name), tmp_path / "weights.pt")
        description = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {"resize_mode": "longest"}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match='resize_mode "longest"'):
            load_open_clip(name, file)

    def test_description_of_another_model_beside_the_file(self, register, tmp_path):
        name = register("ViT-B-32")
        file = save(open_clip.create_model(name), tmp_path / "weights.pt")
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": open_clip.get_model_config("ViT-L-14")})
        )
        with pytest.raises(ValueError, match=f"describes another vision tower than {name}"):
            load_open_clip(name, file)

    @pytest.mark.parametrize(
        ("model", "pretrained", "says"),
        [
            ("ViT-L14", "openai", 'knows no model "ViT-L14"; did you mean .*ViT-L-14'),
            ("ViT-L-14", None, "no weights were named for ViT-L-14.*openai"),
            ("ViT-L-14", "openay", "openay is neither a file nor a tag.*openai"),
        ],
    )
    def test_names_that_open_clip_does_not_know(self, model, pretrained, says):
        with pytest.raises(ValueError, match=says):
            load_open_clip(model, pretrained)

    def test_without_a_vision_tower(self, register, tmp_path):
        torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="no vision tower of open_clip"):
            load_open_clip(register("ViT-B-32"), tmp_path / "other.pt")


class TestEndToEnd:
    @pytest.fixture
    def longvlm(self, monkeypatch, capsys):
        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["longvlm", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            return ended.value.code, *capsys.readouterr()

        return run

    def test_command_then_assemble_is_assemble_in_one_go(self, register, longvlm, tmp_path):
        name = register("ViT-L-14-336")
        file = save(random_model(name), tmp_path / "weights.pt")
        llm = save_tiny_llm(tmp_path / "llm")
        assert longvlm("convert", "open-clip", "--model", name, "--pretrained", file, "--out", tmp_path / "vit")[
            :2
        ] == (
            0,
            f"{tmp_path / 'vit'}\n",
        )
        method = [part for key, value in METHOD.items() for part in (f"--{key.replace('_', '-')}", value)]
        for vision, out in ((tmp_path / "vit", "two"), (f"open_clip:{name}/{file}", "one")):
            code, _, err = longvlm("assemble", "--vision", vision, "--language", llm, "--out", tmp_path / out, *method)
            assert code == 0, err

        two, one = (LongVLMForConditionalGeneration.from_pretrained(tmp_path / out) for out in ("two", "one"))
        first, second = two.state_dict(), one.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        ours = [LongVLMProcessor.from_pretrained(tmp_path / out).video_processor.to_dict() for out in ("two", "one")]
        assert ours[0] == ours[1]
        for config in (tmp_path / "one" / "config.json", tmp_path / "vit" / "config.json"):
            assert str(tmp_path) not in config.read_text()

        video = write_video(tmp_path / "square.mp4", 24, rate=8)
        pipe = pipeline("video-question-answering", model=str(tmp_path / "one"))
        expected = pipe(video=str(video), question="What?", max_new_tokens=5, do_sample=False)["answer"]
        code, out, _ = longvlm("ask", video, "What?", "--model", tmp_path / "two", "--max-new-tokens", 5, "-q")
        assert (code, out) == (0, f"{expected}\n")

    def test_errors_are_one_line_and_exit_code_2(self, longvlm, tmp_path):
        arguments = ("--model", "RN50", "--pretrained", "openai", "--out", tmp_path / "vit", "--quiet")
        code, out, err = longvlm("convert", "open-clip", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("longvlm: error: open_clip:RN50/openai: its vision tower is a ResNet")
        assert err.count("\n") == 1

    def test_loaded_as_any_other_encoder(self, register, tmp_path):
        name = register("ViT-B-32")
        file = save(random_model(name), tmp_path / "weights.pt")
        folder = convert_open_clip(name, tmp_path / "vit", pretrained=file)
        direct, converted = load_vision(f"open_clip:{name}/{file}"), load_vision(folder)
        # Lists in a file become tuples in some versions.
        plain = [json.loads(json.dumps(part.image_options)) for part in (direct, converted)]
        assert plain[0] == plain[1]
        assert direct.name == f"open_clip:{name}/weights.pt"
        with pytest.raises(ValueError, match="is not empty"):
            convert_open_clip(name, folder, pretrained=file)
