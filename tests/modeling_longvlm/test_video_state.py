"""A video that grows: whatever the cuts, and whenever it is read, its features are those of all frames at once."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvlm.modeling_longvlm.modeling_longvlm import LongVLMVideoFeatures
from tests.helpers.tiny_models import noise_video, tiny_longvlm

MODELS = {placement: tiny_longvlm(global_placement=placement)[0] for placement in ("prefix", "suffix", "none")}
PIXELS = noise_video(16)[0]


def assert_same(actual, expected):
    """Features of one video: the same tokens, before and after the projector, and the same facts."""
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.pooler_output[0], expected.pooler_output[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.local_features[0], expected.local_features[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.global_features, expected.global_features, atol=1e-5, rtol=0)
    assert actual.num_frames == expected.num_frames and actual.frames_per_segment == expected.frames_per_segment


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda cuts: 0 < sum(cuts) <= 16),
    read=st.sets(st.integers(0, 5)),
    placement=st.sampled_from(sorted(MODELS)),
    chunk=st.integers(1, 7),
)
def test_any_cuts_read_at_any_time(cuts, read, placement, chunk):
    model = MODELS[placement]
    model.config.vision_chunk_frames = chunk
    state, frames = model.start_video(), 0
    for number, length in enumerate(cuts):
        state.append(PIXELS[frames : frames + length])
        frames += length
        assert state.num_frames == frames
        if frames and (number in read or number == len(cuts) - 1):
            assert_same(state.features(), model.get_video_features(PIXELS[None, :frames]))


@pytest.mark.parametrize("k", [1, 3, 16, 100])
def test_segments_of_another_length(k):
    model = MODELS["prefix"]
    state = model.start_video(frames_per_segment=k)
    for piece in PIXELS.split(5):
        state.append(piece)
    features = state.features()
    assert features.frames_per_segment == (k,)
    config = copy.deepcopy(model.config)
    config.frames_per_segment = k
    assert features.num_tokens(config) == [len(features.pooler_output[0])] == [config.num_video_tokens(16)]
    other, _ = tiny_longvlm(frames_per_segment=k)
    other.load_state_dict(model.state_dict())
    assert_same(features, other.get_video_features(PIXELS[None]))


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_segments_of_an_impossible_length_are_refused(k):
    with pytest.raises(ValueError, match=f"frames_per_segment.* {k}"):
        MODELS["prefix"].start_video(frames_per_segment=k)


def test_what_is_known_of_a_video():
    model = MODELS["prefix"]
    state = model.start_video()
    state.append(PIXELS[:3], timestamps=[0.0, 0.5, 1.0])
    state.append(PIXELS[3:6], timestamps=torch.tensor([1.5, 2.0, 2.5], dtype=torch.float64))
    features = state.features()
    assert features.num_frames == (6,) and features.frames_per_segment == (4,) and features.duration == (None,)
    (seconds,) = features.segment_seconds
    assert seconds.dtype == torch.float64 and seconds.tolist() == [[0.0, 1.5], [2.0, 2.5]]
    state.duration = 3.25
    assert state.features().duration == (3.25,)
    state.append(PIXELS[6:7])  # from here on it is not known when a frame was
    features = state.features()
    assert features.segment_seconds == (None,) and features.num_frames == (7,) and features.duration == (3.25,)


def test_all_frames_at_once_know_their_numbers():
    features = MODELS["prefix"].get_video_features(PIXELS[None].expand(2, -1, -1, -1, -1), num_frames=[16, 5])
    assert features.num_frames == (16, 5) and features.frames_per_segment == (4, 4)


def test_frames_that_do_not_fit_leave_the_video_as_it_was():
    state = MODELS["prefix"].start_video()
    state.append(PIXELS[:5], timestamps=range(5))
    expected = state.features()
    with pytest.raises(ValueError, match=r"28 x 28 pixels.* 56 x 56"):
        state.append(noise_video(2, size=28)[0], timestamps=[5, 6])
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 56, 56\)"):
        state.append(PIXELS[None, :2], timestamps=[5, 6])
    with pytest.raises(ValueError, match=r"1 timestamps.* 2 frames"):
        state.append(PIXELS[:2], timestamps=[5])
    assert state.num_frames == 5
    actual = state.features()
    assert_same(actual, expected)
    assert torch.equal(actual.segment_seconds[0], expected.segment_seconds[0])


def test_a_video_without_a_frame_has_no_features():
    state = MODELS["prefix"].start_video()
    with pytest.raises(ValueError, match="at least one frame"):
        state.features()
    state.append(PIXELS[:0])
    with pytest.raises(ValueError, match="at least one frame"):
        state.features()


def bytes_held(value) -> int:
    """Of all storages that `value` keeps alive, each counted once: a view keeps all of what it was cut from."""
    storages = {}

    def walk(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    for item in vars(value).values():
        walk(item)
    return sum(storages.values())


@torch.no_grad()
def test_memory_is_bounded():
    """Each segment costs its tokens; what waits for the rest of a segment is never more than a chunk of patches."""
    model, _ = tiny_longvlm(tokens_per_segment=2, vision_chunk_frames=16)
    state = model.start_video()
    for piece in noise_video(150)[0].split(25):  # pieces end in the middle of a segment
        state.append(piece)
    segments, width, patches = 150 // 4, 64, 16
    tokens, waiting = segments * 2 * width * 4, 4 * patches * width * 4
    assert bytes_held(state) <= tokens + waiting + 2 * width * 4 + 64
    before = bytes_held(state)
    for _ in range(3):
        state.features()
    assert bytes_held(state) == before


@torch.no_grad()
def test_sums_over_many_frames_are_exact_in_half_precision():
    model, _ = tiny_longvlm(num_global_layers=1)
    model.to(torch.bfloat16)
    pixels = noise_video(1)[0].expand(600, -1, -1, -1)
    state = model.start_video()
    for piece in pixels.split(16):
        state.append(piece)
    one = model.get_video_features(pixels[None, :1])
    torch.testing.assert_close(state.features().global_features, one.global_features, atol=0, rtol=0.01)


def test_gradients_reach_the_encoder_through_a_growing_video():
    model, _ = tiny_longvlm()
    gradients = []
    for cuts in ([16], [5, 11]):
        model.zero_grad()
        state = model.start_video()
        for piece in PIXELS.split(cuts):
            state.append(piece)
        state.features().pooler_output[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("vision_tower" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("frames", [1, 6, 8])
def test_each_patch_knows_its_token(frames):
    model = MODELS["prefix"]
    assignment = model.base_model.get_token_assignment(PIXELS[:frames])
    local_features = model.get_video_features(PIXELS[None, :frames]).local_features[0]
    hidden_states = model.model.vision_tower(PIXELS[:frames], output_hidden_states=True).hidden_states
    patches = hidden_states[model.config.vision_feature_layer][:, 1:]
    assert assignment.shape == patches.shape[:2]
    assert assignment.unique().tolist() == list(range(len(local_features)))
    for token, local in enumerate(local_features):
        torch.testing.assert_close(patches[assignment == token].mean(0), local, atol=1e-5, rtol=0)


def facts(features):
    return features.num_frames, features.duration, features.frames_per_segment, features.segment_seconds


def growing_video(frames, **times):
    state = MODELS["prefix"].start_video()
    state.append(PIXELS[:frames], **times)
    return state


def test_choosing_and_joining_videos_keeps_what_is_known_of_them():
    first, second = growing_video(5, timestamps=[0, 1, 2, 3, 4]), growing_video(9)
    first.duration = 5.0
    both = LongVLMVideoFeatures.cat([first.features(), second.features()])
    assert facts(both)[:3] == ((5, 9), (5.0, None), (4, 4))
    assert both.segment_seconds[0].tolist() == [[0, 3], [4, 4]] and both.segment_seconds[1] is None
    swapped = both.select([1, 0, 1])
    assert facts(swapped)[:3] == ((9, 5, 9), (None, 5.0, None), (4, 4, 4))
    assert torch.equal(swapped.segment_seconds[1], both.segment_seconds[0])
    assert facts(both.detach()) == facts(both)
    assert not both.detach().local_features[0].requires_grad and both.local_features[0].requires_grad
    assert both.detach().pooler_output is None
    size = sum(t.numel() * 4 for t in [*both.local_features, both.global_features])
    assert both.num_bytes == size
    assert both.num_tokens(MODELS["prefix"].config) == [MODELS["prefix"].config.num_video_tokens(n) for n in (5, 9)]


def test_joining_videos_of_which_nothing_is_known():
    known = growing_video(5).features()
    bare = LongVLMVideoFeatures(local_features=known.local_features, global_features=known.global_features)
    assert facts(LongVLMVideoFeatures.cat([bare, bare])) == (None, None, None, None)
    assert LongVLMVideoFeatures.cat([bare, known]).num_frames == (None, 5)
    assert facts(bare.select([0, 0])) == (None, None, None, None)


def test_the_model_hands_on_what_is_known():
    model, processor = MODELS["prefix"], tiny_longvlm()[1]
    features = growing_video(5, timestamps=[0, 1, 2, 3, 4]).features()
    inputs = processor(text="<video>\nWhat?", num_video_tokens=features.num_tokens(model.config), return_tensors="pt")
    outputs = model(**inputs, video_features=features)
    assert facts(outputs.video_features)[:3] == facts(features)[:3]
    generate = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    assert model.generate(**inputs, video_features=features, **generate).shape[1] == inputs["input_ids"].shape[1] + 2


def test_without_global_tokens_none_are_computed():
    model = MODELS["none"]
    features = model.get_video_features(PIXELS[None, :6])
    assert features.global_features.shape == (1, 0, 64)
    # Features from before, or of a model with global tokens, still serve.
    older = MODELS["prefix"].get_video_features(PIXELS[None, :6])
    inputs = {"input_ids": torch.full((1, len(features.pooler_output[0])), model.config.video_token_id)}
    assert torch.equal(model(**inputs, video_features=older).logits, model(**inputs, video_features=features).logits)


def test_features_without_the_global_tokens_that_the_model_places_are_refused():
    features = MODELS["none"].get_video_features(PIXELS[None, :6])
    model = MODELS["prefix"]
    inputs = {"input_ids": torch.full((1, features.num_tokens(model.config)[0]), model.config.video_token_id)}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"0 global tokens.* 2"):
            call(**inputs, video_features=features)
