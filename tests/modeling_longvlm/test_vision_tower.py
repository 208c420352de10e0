"""Vision encoders: what is read of each family, that no more is computed or kept, and the door for new encoders."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    ViTConfig,
)

from longvlm import LongVLMConfig, LongVLMModel
from longvlm.modeling_longvlm import vision_tower_longvlm
from longvlm.modeling_longvlm.vision_tower_longvlm import EncodedFrames, VisionEncoder
from tests.helpers.tiny_models import noise_video, tiny_config, tiny_longvlm, tiny_text_config

SIZE, PATCHES, LAYERS = 28, 4, 4
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 14,
}
WITH_MLP = {**SMALL, "intermediate_size": 64}
FAMILIES = {
    "clip": (CLIPVisionConfig(**WITH_MLP), "encoder.layers"),
    "siglip": (SiglipVisionConfig(**WITH_MLP), "encoder.layers"),
    "dinov2": (Dinov2Config(**SMALL), "encoder.layer"),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3), "encoder.layer"),
    "vit": (ViTConfig(**WITH_MLP), "layers"),
}
# No file of ours knows it: two tokens before the patches, run as a whole.
UNKNOWN = DeiTConfig(**WITH_MLP)
CONFIGS = {**{name: config for name, (config, _) in FAMILIES.items()}, "unknown (deit)": UNKNOWN}


def make_model(vision_config, **options):
    """So many tokens a segment that nothing is merged: the local features are the patches."""
    options = {"tokens_per_segment": 1000, "frames_per_segment": 3, **options}
    model = tiny_longvlm(vision_config=vision_config, **options)[0].model
    with torch.no_grad():  # biases, layer scales and positions are all zeros or ones at first, and would hide mistakes
        generator = torch.Generator().manual_seed(1)
        for parameter in model.vision_tower.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def reference(model, pixels):
    """Patches `(T * N, d)` and means of the frame tokens `(E, d)`, from all hidden states of the whole encoder."""
    config = model.config
    hidden_states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(hidden_states) == LAYERS + 1
    patches = hidden_states[config.vision_feature_layer][:, -PATCHES:].flatten(0, 1)
    first = LAYERS + 1 - config.num_global_tokens
    tokens = [h[:, 0] if h.shape[1] > PATCHES else h.mean(1) for h in hidden_states[first:]]
    return patches, torch.stack([t.float().mean(0) for t in tokens]).to(patches.dtype) if tokens else None


@pytest.mark.parametrize("options", [{}, {"image_size": 42}], ids=["its own size", "another size"])
@pytest.mark.parametrize("feature_layer", [-2, -1, 0, 1])
@pytest.mark.parametrize("num_global_layers", [0, 2, LAYERS])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_the_whole_encoder(name, num_global_layers, feature_layer, options):
    options = {**options, "vision_feature_layer": feature_layer, "num_global_layers": num_global_layers}
    model = make_model(CONFIGS[name], vision_chunk_frames=2, **options)
    side = model.config.frame_size[0]
    pixels = noise_video(5, size=side)
    resized = {} if name.startswith("dinov2") or side == SIZE else {"interpolate_pos_encoding": True}
    hidden_states = model.vision_tower(pixels[0], output_hidden_states=True, **resized).hidden_states
    patches = model.config.patches_per_frame
    features = model.get_video_features(pixels)
    expected = hidden_states[feature_layer][:, -patches:].flatten(0, 1)
    torch.testing.assert_close(features.local_features[0], expected, atol=1e-5, rtol=0)
    assert features.global_features.shape == (1, num_global_layers, 32)
    for actual, h in zip(features.global_features[0], hidden_states[LAYERS + 1 - num_global_layers :], strict=True):
        frame_tokens = h[:, 0] if h.shape[1] > patches else h.mean(1)
        torch.testing.assert_close(actual, frame_tokens.mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_the_encoders_own(name, dtype):
    model = make_model(CONFIGS[name]).to(dtype)
    pixels = noise_video(3, size=SIZE)
    features = model.get_video_features(pixels)
    patches, frame_tokens = reference(model, pixels[0].to(dtype))
    assert features.local_features[0].dtype == features.global_features.dtype == dtype
    assert torch.equal(features.local_features[0], patches)
    # Of CLIP's last layer one row is computed: another matrix product, rounded differently.
    torch.testing.assert_close(features.global_features[0], frame_tokens, atol=4e-3, rtol=0.016)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_asked_for_is_used(name, attention):
    model = make_model(CONFIGS[name])
    model.set_attn_implementation(attention)
    pixels = noise_video(3, size=SIZE)
    with torch.profiler.profile() as profile:
        features = model.get_video_features(pixels)
    fused = any("scaled_dot_product" in event.key for event in profile.key_averages())
    assert fused == (attention == "sdpa")
    patches, frame_tokens = reference(model, pixels[0])
    torch.testing.assert_close(features.local_features[0], patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.global_features[0], frame_tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, LAYERS),
        ({"global_placement": "suffix"}, LAYERS),
        ({"global_placement": "none"}, LAYERS - 1),
        ({"num_global_layers": 0}, LAYERS - 1),
        ({"num_global_layers": 0, "vision_feature_layer": -1}, LAYERS),
        ({"num_global_layers": 0, "vision_feature_layer": 1}, 1),
        ({"num_global_layers": 0, "vision_feature_layer": 0}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_runs_behind_the_last_one_that_is_read(name, options, layers):
    config, path = FAMILIES[name]
    model = make_model(config, **options)
    calls = []
    for layer in model.vision_tower.get_submodule(path):
        layer.register_forward_hook(lambda layer, args, output: calls.append(layer))
    # What follows the layers: norms and poolers, by whichever name.
    for child, module in model.vision_tower.named_children():
        if child in ("post_layernorm", "layernorm", "head", "pooler"):
            module.register_forward_hook(lambda module, args, output: pytest.fail("nothing behind the layers is read"))
    model.get_video_features(noise_video(5, size=SIZE))
    assert len(calls) == len(set(calls)) == layers  # one chunk


def rows_of_the_last_mlp(model) -> list[int]:
    """Tokens per frame that went through the last layer's MLP in each later call; nothing is hooked on the layer."""
    rows = []

    class Recorded(nn.Module):
        def __init__(self, activation: nn.Module):
            super().__init__()
            self.activation = activation

        def forward(self, hidden_states):
            rows.append(hidden_states.shape[1])
            return self.activation(hidden_states)

    mlp = model.vision_tower.encoder.layers[-1].mlp
    mlp.activation_fn = Recorded(mlp.activation_fn)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_of_clips_last_layer_only_the_class_token_is_computed(attention, dtype):
    model = make_model(CONFIGS["clip"]).to(dtype)
    model.set_attn_implementation(attention)
    rows, pixels = rows_of_the_last_mlp(model), noise_video(5, size=SIZE)
    features = model.get_video_features(pixels)
    assert rows == [1]
    patches, frame_tokens = reference(model, pixels[0].to(dtype))
    tolerance = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 0.016}
    torch.testing.assert_close(features.local_features[0], patches, **tolerance)
    torch.testing.assert_close(features.global_features[0], frame_tokens, **tolerance)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.vision_tower.encoder.layers[-1].register_forward_hook(lambda *args: None),
        lambda model: model.vision_tower.encoder.layers[-1].self_attn.register_forward_pre_hook(lambda *args: None),
        lambda model: model.vision_tower.encoder.layers[-1].mlp.fc1.register_forward_hook(lambda *args: None),
        lambda model: setattr(model.config, "vision_feature_layer", -1),
        lambda model: setattr(model.vision_tower.config, "_attn_implementation", "flash_attention_of_tomorrow"),
    ],
    ids=[
        "in training",
        "hook on the layer",
        "hook on its attention",
        "hook within",
        "its patches are read",
        "other attention",
    ],
)
def test_where_more_of_clips_last_layer_is_needed_it_runs_whole(change, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_of_tomorrow", ALL_ATTENTION_FUNCTIONS["sdpa"]
    )
    model = make_model(CONFIGS["clip"])
    rows, pixels = rows_of_the_last_mlp(model), noise_video(5, size=SIZE)
    change(model)
    features = model.get_video_features(pixels)
    assert rows == [1 + PATCHES]
    patches, frame_tokens = reference(model, pixels[0])
    torch.testing.assert_close(features.local_features[0], patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.global_features[0], frame_tokens, atol=1e-5, rtol=0)


def test_gradients_through_the_class_token_alone_are_those_of_the_whole_layer():
    model, gradients = make_model(CONFIGS["clip"]), []
    for hooked in (False, True):
        if hooked:
            model.vision_tower.register_forward_hook(lambda *args: None)
        model.zero_grad()
        model.get_video_features(noise_video(4, size=SIZE)).global_features.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.vision_tower.named_parameters() if p.grad is not None})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], atol=1e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_few_hidden_states_are_held_at_a_time(name):
    """Of the last E hidden states only the frame tokens: whole are the patches' layer, a layer's input, its output."""
    config, path = FAMILIES[name]
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 9})
    model = make_model(config, num_global_layers=6, vision_feature_layer=-4)
    alive, most = weakref.WeakSet(), []

    def note(layer, args, output):
        alive.add(output[0] if isinstance(output, tuple) else output)
        most.append(len(alive))

    for layer in model.vision_tower.get_submodule(path):
        layer.register_forward_hook(note)
    with torch.no_grad():
        features = model.get_video_features(noise_video(9, size=SIZE))
    assert len(most) == 9 and max(most) <= 3
    del features
    assert not alive


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_whole_encoder(name):
    model = make_model(CONFIGS[name]).train()
    pixels, gradients = noise_video(4, size=SIZE), []
    for hooked in (False, True):
        if hooked:  # an encoder that somebody has a hold on runs by its own call
            model.vision_tower.register_forward_hook(lambda *args: None)
        model.zero_grad()
        features = model.get_video_features(pixels)
        (features.local_features[0].square().sum() + features.global_features.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.vision_tower.named_parameters() if p.grad is not None})
    # Parameters that only the pooler has may have zeros instead of nothing.
    assert gradients[0] and gradients[0].keys() <= gradients[1].keys()
    for parameter, gradient in gradients[1].items():
        expected = gradients[0].get(parameter, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_runs_layers_twice_and_changes_no_gradient(name):
    config, path = FAMILIES[name]
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = make_model(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        attention = next(m for n, m in model.vision_tower.get_submodule(path)[0].named_children() if "att" in n)
        attention.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model.get_video_features(noise_video(4, size=SIZE)).local_features[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.vision_tower.named_parameters() if p.grad is not None})
        runs.append(len(calls))
    assert runs == [1, 2]
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], atol=1e-5, rtol=1e-4, msg=parameter)


def test_hooks_on_the_encoder_are_called():
    model = make_model(CONFIGS["clip"])
    pixels = noise_video(3, size=SIZE)
    expected = model.get_video_features(pixels)
    before, after = [], []
    model.vision_tower.register_forward_pre_hook(lambda *args: before.append(1))
    model.vision_tower.register_forward_hook(lambda *args: after.append(1))
    features = model.get_video_features(pixels)
    assert before == after == [1]
    torch.testing.assert_close(features.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


def test_an_encoder_in_a_wrapper_is_called_as_a_whole():
    """DataParallel, FSDP 1 and others stand in the encoder's place, and must see the call."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = make_model(CONFIGS["clip"])
    pixels = noise_video(3, size=SIZE)
    expected = model.get_video_features(pixels)
    model.vision_tower = Wrapper(model.vision_tower)
    features = model.get_video_features(pixels)
    assert model.vision_tower.calls == 1
    torch.testing.assert_close(features.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["clip", "unknown (deit)"])
def test_threads_encode_at_the_same_time(name):
    model = make_model(CONFIGS[name], vision_chunk_frames=2, tokens_per_segment=6)
    videos = [noise_video(9 + i, seed=i, size=SIZE) for i in range(4)]
    with torch.no_grad():
        expected = [model.get_video_features(video).last_hidden_state for video in videos]

    def encode(number):
        with torch.no_grad():
            return number % 4, model.get_video_features(videos[number % 4]).last_hidden_state

    with ThreadPoolExecutor(4) as pool:
        for number, actual in pool.map(encode, range(40)):
            torch.testing.assert_close(actual, expected[number], atol=1e-5, rtol=0)


def test_threads_with_and_without_global_tokens_at_the_same_time():
    """Which layers run is no state of the encoder: another model may share it."""
    with_tokens = make_model(CONFIGS["clip"])
    without = LongVLMModel(LongVLMConfig(**{**with_tokens.config.to_dict(), "global_placement": "none"})).eval()
    without.load_state_dict(with_tokens.state_dict())
    without.vision_tower = with_tokens.vision_tower
    pixels = noise_video(9, size=SIZE)
    models = [with_tokens, without]
    with torch.no_grad():
        expected = [model.get_video_features(pixels).last_hidden_state for model in models]

    def encode(number):
        with torch.no_grad():
            return number % 2, models[number % 2].get_video_features(pixels).last_hidden_state

    with ThreadPoolExecutor(4) as pool:
        for number, actual in pool.map(encode, range(40)):
            torch.testing.assert_close(actual, expected[number], atol=1e-5, rtol=0)


class ClipsConfig(PreTrainedConfig):
    model_type = "clips_for_tests"

    def __init__(self, hidden_size=16, num_hidden_layers=2, image_size=28, patch_size=14, clip_frames=4, **kwargs):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.image_size, self.patch_size, self.clip_frames = image_size, patch_size, clip_frames
        super().__init__(**kwargs)


class ClipsModel(PreTrainedModel):
    """Each token sees all tokens of its clip: `(clips, frames, 3, H, W)` -> hidden states `(clips, frames * N, d)`."""

    config_class = ClipsConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.layers = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.clips_seen = []
        self.post_init()

    def forward(self, pixel_values):
        self.clips_seen.append(tuple(pixel_values.shape[:2]))
        clips = pixel_values.shape[0]
        hidden_state = self.embed(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)  # (clips * frames, N, d)
        hidden_states = [hidden_state.unflatten(0, (clips, -1)).flatten(1, 2)]
        for layer in self.layers:
            hidden_state = hidden_states[-1]
            hidden_states.append(torch.tanh(layer(hidden_state)) + hidden_state.mean(1, keepdim=True))
        return hidden_states


class ClipsEncoder(VisionEncoder):
    """All that a new encoder costs: how it is built, run and read. The clip's mean stands for each of its frames."""

    def clip_frames(self, config):
        return config.clip_frames

    def build(self, config):
        return ClipsModel._from_config(config)

    def encode(self, tower, frames, reading):
        length = min(tower.config.clip_frames, len(frames))
        hidden_states = tower(frames.unflatten(0, (-1, length)))
        patches = hidden_states[reading.feature_layer].unflatten(1, (length, -1)).flatten(0, 1)
        frame_tokens = [hidden_states[i].mean(1).repeat_interleave(length, 0) for i in reading.frame_layers]
        none = patches.new_zeros(0, len(frames), patches.shape[-1])
        return EncodedFrames(patches, torch.stack(frame_tokens) if frame_tokens else none)


@pytest.fixture
def clips_model(monkeypatch):
    monkeypatch.setitem(vision_tower_longvlm.ENCODERS, ClipsConfig.model_type, ClipsEncoder())

    def make(**options):
        values = {"frames_per_segment": 6, "tokens_per_segment": 5, "num_global_layers": 1, "merge_num_heads": 4}
        torch.manual_seed(0)
        config = LongVLMConfig(ClipsConfig(), tiny_text_config(), **{**values, **options})
        return LongVLMModel(config).eval()

    return make


def clips_reference(model, pixels):
    """Patches `(T, N, d)` and the mean of the frame tokens `(d,)`: clip by clip, the last one may be short."""
    with torch.no_grad():
        hidden_states = [model.vision_tower(clip[None]) for clip in pixels.split(4)]
    patches = torch.cat([h[-2].view(-1, 4, 16) for h in hidden_states])
    sums = [h[-1].mean((0, 1)) * (h[-1].shape[1] // 4) for h in hidden_states]
    return patches, torch.stack(sums).sum(0) / len(pixels)


@pytest.mark.parametrize("chunk", [1, 4, 6, 8, 100])
@pytest.mark.parametrize("frames", [1, 3, 4, 8, 14, 17])
def test_an_encoder_that_sees_clips(clips_model, frames, chunk):
    model = clips_model(vision_chunk_frames=chunk, tokens_per_segment=1000)
    pixels = noise_video(frames, size=28)
    patches, frame_token = clips_reference(model, pixels[0])
    model.vision_tower.clips_seen.clear()
    features = model.get_video_features(pixels)
    torch.testing.assert_close(features.local_features[0], patches.flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.global_features[0, 0], frame_token, atol=1e-5, rtol=0)
    seen = model.vision_tower.clips_seen
    assert all(length == 4 for _, length in seen[:-1]) and sum(clips * length for clips, length in seen) == frames
    assert max(clips * length for clips, length in seen) <= max(chunk, 4)
    assert len(features.pooler_output[0]) == model.config.num_video_tokens(frames)


@pytest.mark.parametrize("placement", ["prefix", "none"])
@pytest.mark.parametrize("cuts", [[17], [1] * 17, [3, 5, 6, 3], [4, 4, 4, 4, 1]], ids=str)
def test_clips_are_never_cut_in_two(clips_model, cuts, placement):
    model = clips_model(global_placement=placement)
    pixels = noise_video(17, size=28)
    state, frames = model.start_video(), 0
    for piece in pixels[0].split(cuts):
        state.append(piece)
        frames += len(piece)
        expected = model.get_video_features(pixels[:, :frames]).last_hidden_state
        torch.testing.assert_close(state.features().last_hidden_state, expected, atol=1e-5, rtol=0)
    assignment = model.get_token_assignment(pixels[0])
    patches, _ = clips_reference(model, pixels[0])
    for token, local in enumerate(state.features().local_features[0]):
        torch.testing.assert_close(patches[assignment == token].mean(0), local, atol=1e-5, rtol=0)


def test_padding_frames_of_a_clip_change_nothing(clips_model):
    model = clips_model()
    pixels = noise_video(9, 6, size=28)
    pixels[1, 6:] = float("nan")
    features = model.get_video_features(pixels, num_frames=[9, 6])
    alone = model.get_video_features(pixels[1:, :6])
    torch.testing.assert_close(features.pooler_output[1], alone.pooler_output[0], atol=1e-5, rtol=0)


def test_an_encoder_that_nobody_registered_is_built_by_transformers():
    config = tiny_config(vision_config=UNKNOWN)
    assert type(LongVLMModel(config).vision_tower).__name__ == "DeiTModel"
