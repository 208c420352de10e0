"""The model: the released numbers from pixels to logits, constant memory, and what batches must not change."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, Dinov2Config, GPT2Config, LlamaConfig, SiglipVisionConfig, ViTConfig

from longvlm import LongVLMConfig, LongVLMForConditionalGeneration, LongVLMModel, merge_tokens
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_models import noise_video, tiny_config, tiny_longvlm, tiny_vision_config

CLIP = json.loads((FIXTURES / "clip.json").read_text())


def golden_clip_model(**options):
    """The golden vision tower in a LongVLM with the golden merging settings."""
    config = LongVLMConfig(
        {"model_type": "clip_vision_model", **CLIP["vision_config"]},
        tiny_config().text_config,
        frames_per_segment=CLIP["frames_per_segment"],
        tokens_per_segment=CLIP["tokens_per_segment"],
        merge_num_heads=CLIP["merge_num_heads"],
        **options,
    )
    model = LongVLMModel(config).eval()
    model.vision_tower.load_state_dict(load_file(FIXTURES / "clip_weights.safetensors"), strict=True)
    return model


def golden_llm(case: str, **options):
    """The golden LLM and projector, and the features of one golden video."""
    tensors = load_file(FIXTURES / "original_tiny.safetensors")
    expected = json.loads((FIXTURES / "original_tiny.json").read_text())
    llm, ids = expected["llm"], expected["added_token_ids"]
    config = LongVLMConfig(
        tiny_vision_config(num_hidden_layers=6).to_dict(),
        LlamaConfig(vocab_size=expected["vocab_final"], bos_token_id=1, eos_token_id=2, pad_token_id=0, **llm),
        video_token_id=ids["<vid_patch>"],
        video_start_token_id=ids["<vid_start>"],
        video_end_token_id=ids["<vid_end>"],
        **options,
    )
    model = LongVLMForConditionalGeneration(config).eval()
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("merged.model."):
            state[name.replace("merged.model.", "model.language_model.")] = tensor.float()
    state["model.language_model.embed_tokens.weight"] = tensors["embed_tokens_final"]
    state["model.multi_modal_projector.linear_1.weight"] = tensors["projector.weight"]
    state["model.multi_modal_projector.linear_1.bias"] = tensors["projector.bias"]
    head = tensors["merged.lm_head.weight"].float()
    state["lm_head.weight"] = torch.cat([head, head.mean(0, keepdim=True).expand(3, -1)])
    model.load_state_dict(state)
    features = {
        "local_features": [tensors[f"{case}.local"].float()],
        "global_features": tensors[f"{case}.memory"][-5:].float()[None],
    }
    return model, features, tensors


def test_released_numbers_from_pixels_to_features():
    golden = load_file(FIXTURES / "clip.safetensors")
    model = golden_clip_model()
    features = model.get_video_features(golden["pixel_values"][None])
    torch.testing.assert_close(features.global_features[0], golden["global_last5"], atol=5e-5, rtol=0)
    torch.testing.assert_close(features.local_features[0], golden["merged"], atol=5e-5, rtol=0)
    torch.testing.assert_close(features.last_hidden_state[0], golden["features_global_then_local"], atol=5e-5, rtol=0)
    assert len(features.pooler_output[0]) == model.config.num_video_tokens(CLIP["frames"]) == 5 + 4 + 4 + 4


@pytest.mark.parametrize("case", ["video_305", "video_205"])
def test_released_logits(case):
    options = {"tokens_per_segment": 30 if case == "video_305" else 20}
    model, features, golden = golden_llm(case, **options)
    input_ids = golden[f"{case}.input_ids"][None]
    with torch.no_grad():
        outputs = model(input_ids=input_ids, video_features=features)
    logits = outputs.logits[0, golden[f"{case}.logits_rows"], : golden[f"{case}.logits"].shape[1]]
    torch.testing.assert_close(logits, golden[f"{case}.logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(
        outputs.video_features.pooler_output[0], golden[f"{case}.projected_features"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("placement", ["prefix", "suffix", "none"])
def test_as_many_tokens_as_the_configuration_says(frames, placement):
    model, _ = tiny_longvlm(global_placement=placement)
    features = model.get_video_features(noise_video(frames))
    assert len(features.pooler_output[0]) == model.config.num_video_tokens(frames)
    assert features.pooler_output[0].shape[1] == model.config.text_config.hidden_size


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 8, 100])
def test_chunks_change_nothing(chunk):
    model = golden_clip_model()
    pixels = noise_video(23)
    whole = model.get_video_features(pixels)
    model.config.vision_chunk_frames = chunk
    parts = model.get_video_features(pixels)
    torch.testing.assert_close(parts.last_hidden_state, whole.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cuts", [[23], [1, 22], [7, 9, 7], [1] * 23])
def test_a_video_in_pieces_is_the_video(cuts):
    model = golden_clip_model()
    pixels = noise_video(23)
    whole = model.get_video_features(pixels)
    pieces = model.encode_video(iter(pixels[0].split(cuts)), num_frames=23)
    assert not pieces.pooler_output[0].requires_grad  # the graph of every frame would stay in memory
    torch.testing.assert_close(pieces.last_hidden_state, whole.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(pieces.pooler_output[0], whole.pooler_output[0], atol=1e-5, rtol=0)


def test_a_video_without_a_piece_is_refused():
    model, _ = tiny_longvlm()
    with pytest.raises(ValueError, match="at least one frame"):
        model.encode_video([])


def test_the_vision_tower_sees_a_bounded_number_of_frames():
    model, _ = tiny_longvlm(vision_chunk_frames=3)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda tower, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    model.get_video_features(noise_video(20))
    assert sum(seen) == 20 and max(seen) == 3


def test_padding_frames_and_neighbours_change_nothing():
    model, _ = tiny_longvlm()
    pixels = noise_video(9, 5, 2)
    together = model.get_video_features(pixels, num_frames=torch.tensor([9, 5, 2]))
    pixels[1, 5:], pixels[2, 2:] = 1e3, float("nan")
    noisy = model.get_video_features(pixels, num_frames=[9, 5, 2])
    for i, frames in enumerate([9, 5, 2]):
        alone = model.get_video_features(pixels[i : i + 1, :frames])
        assert torch.equal(noisy.pooler_output[i], together.pooler_output[i])
        torch.testing.assert_close(noisy.pooler_output[i], alone.pooler_output[0])


def test_global_tokens_are_averages_over_all_frames_and_last_layers():
    model, _ = tiny_longvlm(num_global_layers=2)
    pixels = noise_video(7)
    hidden_states = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states
    expected = torch.stack([h[:, 0].mean(0) for h in hidden_states[-2:]])
    torch.testing.assert_close(model.get_video_features(pixels).global_features[0], expected, atol=1e-5, rtol=0)


def test_placements_of_the_global_tokens():
    pixels = noise_video(6)
    features = {}
    for placement in ("prefix", "suffix", "none"):
        model, _ = tiny_longvlm(global_placement=placement)
        features[placement] = model.get_video_features(pixels)
    local, global_ = features["prefix"].local_features[0], features["prefix"].global_features[0]
    assert torch.equal(features["prefix"].last_hidden_state[0], torch.cat([global_, local]))
    assert torch.equal(features["suffix"].last_hidden_state[0], torch.cat([local, global_]))
    assert torch.equal(features["none"].last_hidden_state[0], local)


@pytest.mark.parametrize(
    "options", [{"merge_similarity": "per_head"}, {"merge_order": "time"}, {"merge_schedule": [20, 9]}]
)
def test_merging_options_reach_the_merging(options):
    model, _ = tiny_longvlm(**options)
    pixels = noise_video(4)
    patches = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    expected = merge_tokens(
        patches[None],
        model.config.tokens_per_segment,
        schedule=model.config.merge_schedule,
        num_heads=model.config.merge_num_heads,
        similarity=model.config.merge_similarity,
        order=model.config.merge_order,
        tokens_per_frame=16,
    )[0]
    actual = model.get_video_features(pixels).local_features[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_reach_what_is_trained(trainable):
    model, processor = tiny_longvlm()
    model.train()
    model.model.vision_tower.requires_grad_(trainable)
    inputs = processor(text="<video>\nWhat?", num_video_tokens=[model.config.num_video_tokens(9)], return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.video_token_id, -100)
    model(**inputs, pixel_values_videos=noise_video(9), labels=labels).loss.backward()
    patch_embedding = model.model.vision_tower.embeddings.patch_embedding.weight
    assert (patch_embedding.grad is not None and patch_embedding.grad.abs().sum() > 0) == trainable
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, processor = tiny_longvlm()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = processor(
            text="<video> What?", num_video_tokens=[model.config.num_video_tokens(5)], return_tensors="pt"
        )
        model(**inputs, pixel_values_videos=noise_video(5), labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_loss_is_that_of_the_answers():
    model, processor = tiny_longvlm()
    inputs = processor(
        text="<video>\nWhat? A cat.", num_video_tokens=[model.config.num_video_tokens(4)], return_tensors="pt"
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    outputs = model(**inputs, pixel_values_videos=noise_video(4), labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[0, -6:-1], labels[0, -5:])
    torch.testing.assert_close(outputs.loss, expected)


def test_precomputed_features_give_the_same_logits():
    model, processor = tiny_longvlm()
    pixels = noise_video(9, 5)
    counts = [model.config.num_video_tokens(n) for n in (9, 5)]
    inputs = processor(
        text=["<video>\nOne?", "Two? <video>"], num_video_tokens=counts, padding=True, return_tensors="pt"
    )
    features = model.get_video_features(pixels, num_frames=[9, 5])
    expected = model(**inputs, pixel_values_videos=pixels, num_frames=torch.tensor([9, 5])).logits
    assert torch.equal(model(**inputs, video_features=features).logits, expected)
    as_mapping = {"local_features": list(features.local_features), "global_features": features.global_features}
    assert torch.equal(model(**inputs, video_features=as_mapping).logits, expected)
    separately = type(features).cat([features.select([0]), features.select([1])])
    assert torch.equal(model(**inputs, video_features=separately).logits, expected)


def test_outputs_hold_the_videos_by_transformers_name_too():
    model, processor = tiny_longvlm()
    count = model.config.num_video_tokens(4)
    inputs = processor(text="<video>\nWhat?", video_token_counts=[count], return_tensors="pt")
    for part in (model, model.model):
        outputs = part(**inputs, pixel_values_videos=noise_video(4))
        assert outputs.video_outputs is outputs.video_features
        assert [len(tokens) for tokens in outputs.video_outputs.pooler_output] == [count]
    assert model(**{name: value[:, -3:] for name, value in inputs.items()}).video_outputs is None


def test_embeddings_instead_of_ids():
    model, processor = tiny_longvlm()
    inputs = processor(text="<video>\nWhat?", num_video_tokens=[model.config.num_video_tokens(5)], return_tensors="pt")
    expected = model(**inputs, pixel_values_videos=noise_video(5)).logits
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    actual = model(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], pixel_values_videos=noise_video(5)
    )
    assert torch.equal(actual.logits, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config])
def test_a_tied_head_is_sharded_over_devices_together_with_the_embeddings(kind, tied):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300}
    more = {"intermediate_size": 64} if kind is LlamaConfig else {}
    text_config = kind(**sizes, **more, tie_word_embeddings=tied)
    model = LongVLMForConditionalGeneration(tiny_config(text_config=text_config))
    names = {module: name for name, module in model.named_modules()}
    head, embeddings = (names[part] in model.tp_plan for part in (model.lm_head, model.get_input_embeddings()))
    assert head == (embeddings if tied else True)


def test_disagreeing_numbers_are_named():
    model, processor = tiny_longvlm()
    right = model.config.num_video_tokens(8)
    pixels = noise_video(8)

    def message(text, counts, **videos):
        inputs = processor(text=text, num_video_tokens=counts, padding=True, return_tensors="pt")
        with pytest.raises(ValueError) as error:
            model.generate(**inputs, **videos, max_new_tokens=1)
        if videos:
            with pytest.raises(ValueError) as forward_error:
                model(**inputs, **videos)
            assert str(forward_error.value) == str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    text = message("<video> x", [right + 1], pixel_values_videos=pixels)
    assert f"{right + 1} placeholders" in text and f"give {right} tokens:" in text
    assert "no video" in message("<video> x", [right])
    assert "2 videos" in message("<video> x", [right], pixel_values_videos=noise_video(8, 8))
    text = message(["<video> <video>", "x"], [right, right], pixel_values_videos=pixels)
    assert f"{2 * right} placeholders" in text
    # As many places as tokens in all, but each video would run over into the other prompt.
    text = message(["<video> a", "<video> b"], [right + 2, right - 2], pixel_values_videos=noise_video(8, 8))
    assert "prompt 0" in text


def test_a_training_step_without_its_video_is_refused():
    model, processor = tiny_longvlm()
    inputs = processor(text="<video> x", num_video_tokens=[8], return_tensors="pt")
    with pytest.raises(ValueError, match=r"8 placeholders.*no video"):
        model(**inputs, labels=inputs["input_ids"])
    text = processor(text="Only text.", return_tensors="pt")
    assert model(**text, labels=text["input_ids"]).loss.isfinite()


def test_features_that_are_none_are_refused():
    model, processor = tiny_longvlm()
    pixels = noise_video(4)
    inputs = processor(text="<video>", num_video_tokens=[model.config.num_video_tokens(4)], return_tensors="pt")
    features = model.get_video_features(pixels)
    projected = {"local_features": features.pooler_output, "global_features": features.pooler_output[0][None, :2]}
    for wrong, words in (
        (features.to_tuple(), "tuple"),
        (features.pooler_output, "tuple"),
        (projected, "32 wide.* 64"),
    ):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=words):
                call(**inputs, video_features=wrong)


def test_options_changed_to_impossible_ones_are_named():
    model, _ = tiny_longvlm()
    model.config.vision_chunk_frames = 0
    with pytest.raises(ValueError, match=r"vision_chunk_frames.* 0"):
        model.get_video_features(noise_video(4))


def test_pixels_and_features_together_are_refused():
    model, processor = tiny_longvlm()
    pixels = noise_video(4)
    inputs = processor(text="<video>", num_video_tokens=[model.config.num_video_tokens(4)], return_tensors="pt")
    features = model.get_video_features(pixels)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="not both"):
            call(**inputs, pixel_values_videos=pixels, video_features=features)
    with pytest.raises(ValueError, match="1 to 4"):
        model.get_video_features(pixels, num_frames=[5])
    with pytest.raises(ValueError, match="1 to 4"):
        model.get_video_features(pixels, num_frames=[0])
    with pytest.raises(ValueError, match=r"\(4, 3, 56, 56\)"):
        model.get_video_features(pixels[0])
    with pytest.raises(ValueError, match="no video"):
        model.get_video_features(pixels[:0])
    assert torch.equal(model.get_video_features(pixels, num_frames=4).pooler_output[0], features.pooler_output[0])


@pytest.mark.parametrize(
    "vision_config",
    [
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14),
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_any_encoder(vision_config):
    model, processor = tiny_longvlm(vision_config=vision_config)
    pixels = noise_video(6, size=28)
    features = model.get_video_features(pixels)
    hidden_states = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states
    patches = 4
    has_class_token = hidden_states[-1].shape[1] > patches
    assert has_class_token == (vision_config.model_type != "siglip_vision_model")
    expected = torch.stack([(h[:, 0] if has_class_token else h.mean(1)).mean(0) for h in hidden_states[-2:]])
    torch.testing.assert_close(features.global_features[0], expected, atol=1e-5, rtol=0)
    inputs = processor(text="<video>\nWhat?", num_video_tokens=[model.config.num_video_tokens(6)], return_tensors="pt")
    assert model.generate(**inputs, video_features=features, max_new_tokens=2, min_new_tokens=2).shape[1] > 2


@pytest.mark.parametrize(
    "vision_config",
    [
        tiny_vision_config(),
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14),
    ],
    ids=lambda c: c.model_type,
)
def test_frames_of_another_size_than_the_encoder_was_made_for(vision_config):
    model, _ = tiny_longvlm(vision_config=vision_config, image_size=42)
    assert model.config.patches_per_frame == 9
    features = model.get_video_features(noise_video(3, size=42))
    assert len(features.pooler_output[0]) == model.config.num_video_tokens(3)


def test_frames_that_do_not_fit_the_configuration_are_named():
    model, _ = tiny_longvlm(
        vision_config=Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14
        )
    )
    for size in (28, 84):  # DINOv2 itself takes both
        with pytest.raises(ValueError, match=f"{size} x {size} pixels.* 70 x 70"):
            model.get_video_features(noise_video(3, size=size))


def test_hidden_states_and_attentions_of_the_vision_tower_on_request():
    model, _ = tiny_longvlm(vision_chunk_frames=2)
    model.set_attn_implementation("eager")
    pixels = noise_video(5, 3)
    features = model.get_video_features(pixels, [5, 3], output_hidden_states=True, output_attentions=True)
    frames = torch.cat([pixels[0], pixels[1, :3]])
    expected = model.model.vision_tower(frames, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(features[name]) == len(expected[name])
        for actual, layer in zip(features[name], expected[name], strict=True):
            torch.testing.assert_close(actual, layer)
    assert features.last_hidden_state.shape == (2, model.config.num_video_tokens(5), 64)
    assert not features.last_hidden_state[1, model.config.num_video_tokens(3) :].any()


def test_outputs_as_tuples():
    model, processor = tiny_longvlm()
    pixels = noise_video(4)
    inputs = processor(text="<video>", num_video_tokens=[model.config.num_video_tokens(4)], return_tensors="pt")
    outputs = model(**inputs, pixel_values_videos=pixels)
    as_tuple = model(**inputs, pixel_values_videos=pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)
    assert isinstance(model.get_video_features(pixels, return_dict=False), tuple)
    states = model(**inputs, pixel_values_videos=pixels, output_hidden_states=True).hidden_states
    assert len(states) == model.config.text_config.num_hidden_layers + 1


def test_resized_embeddings():
    model, _ = tiny_longvlm()
    size = model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 7)
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0] == size + 7
    assert model.config.text_config.vocab_size == size + 7
    assert model(input_ids=torch.tensor([[size + 6]])).logits.shape[-1] == size + 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, processor = tiny_longvlm()
    pixels = noise_video(6)
    exact = model.get_video_features(pixels)
    model.to(dtype)
    features = model.get_video_features(pixels)
    assert features.local_features[0].dtype == features.global_features.dtype == dtype
    torch.testing.assert_close(features.global_features.float(), exact.global_features, atol=0.05, rtol=0.05)
    inputs = processor(text="<video>", num_video_tokens=[model.config.num_video_tokens(6)], return_tensors="pt")
    assert model(**inputs, pixel_values_videos=pixels).logits.isfinite().all()
