"""Token merging: the released code's numbers, the paper's equation (1), and what must hold for any input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from longvlm.modeling_longvlm.token_merging import clip_schedule, derive_schedule, merge_tokens
from tests.helpers.paths import FIXTURES

GOLDEN = json.loads((FIXTURES / "merge.json").read_text())
SMALL = [case for case in GOLDEN["cases"] if case["input"]]
FULL = [case for case in GOLDEN["cases"] if not case["input"]]


def full_size_input(salts) -> torch.Tensor:
    """`(10, 2560, 1024)` float32 by the formula of the golden numbers; every value is exact in float32."""
    u = np.uint64
    token, channel = np.arange(2560, dtype=u)[:, None], np.arange(1024, dtype=u)[None]
    segments = []
    for number, salt in enumerate(salts):
        z = u(salt) * u(2**40) + token * u(1024) + channel + u(0x9E3779B97F4A7C15)
        z = (z ^ (z >> u(30))) * u(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u(27))) * u(0x94D049BB133111EB)
        noise = ((z ^ (z >> u(31))) >> u(48)).astype(np.float64) / 32768 - 1
        frame, y, x = token // u(256) + u(number) * u(10), token % u(256) // u(16), token % u(16)
        phase = frame * u(97) + y * u(211) * (channel % u(5) + u(1)) + x * u(157) * (channel % u(3) + u(1))
        phase = (phase + channel * u(1031)) % u(8192)
        triangle = np.where(phase < 4096, phase, u(8191) - phase).astype(np.float64) / 2048 - 1
        segments.append((noise / 2 + triangle).astype(np.float32))
    return torch.from_numpy(np.stack(segments))


def slow_merge(x: np.ndarray, num_tokens: int, num_heads: int, similarity: str) -> tuple[np.ndarray, list[set[int]]]:
    """One segment `(T, d)` in float64, pair by pair, as the paper says it: tokens, and the patches of each."""
    tokens, members = list(x.astype(np.float64)), [{i} for i in range(len(x))]

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    def similar(a, b):
        a, b = a.reshape(num_heads, -1), b.reshape(num_heads, -1)
        if similarity == "mean_head":
            return cosine(a.mean(0), b.mean(0))
        return np.mean([cosine(p, q) for p, q in zip(a, b, strict=True)])  # equation (1)

    while len(tokens) > num_tokens:
        r = min(len(tokens) // 2, len(tokens) - num_tokens)
        first, second = range(0, len(tokens), 2), range(1, len(tokens), 2)
        pairs = []
        for i in first:
            scores = [similar(tokens[i], tokens[j]) for j in second]
            pairs.append((max(scores), i, second[int(np.argmax(scores))]))
        pairs.sort(key=lambda pair: -pair[0])
        for _, i, j in pairs[:r]:
            members[j] = members[j] | members[i]
        members = [members[i] for _, i, _ in pairs[r:]] + [members[j] for j in second]
        tokens = [x[sorted(m)].astype(np.float64).mean(0) for m in members]
    return np.stack(tokens), members


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case["name"])
def test_released_numbers(case):
    tensors = load_file(FIXTURES / "merge.safetensors")
    x = tensors[case["input"]]
    merged, assignment = merge_tokens(
        x, schedule=case["schedule"], num_heads=case["num_heads"], return_assignment=True
    )
    torch.testing.assert_close(merged, tensors[case["expected"]], atol=1e-5, rtol=0)
    assert torch.equal(assignment, tensors[case["assignment"]].long())
    effective = clip_schedule(case["schedule"], x.shape[1])
    assert effective == [r for r in case["effective_schedule"] if r > 0]
    if case["is_derived_schedule"]:
        assert torch.equal(merged, merge_tokens(x, case["num_tokens"], num_heads=case["num_heads"]))


def test_released_numbers_at_full_size():
    x = full_size_input(FULL[0]["salts"])
    for case in FULL:  # the paper's schedule to 30 tokens, and the released script's, which ends at 20
        tensors = load_file(FIXTURES / f"merge_{case['name']}.safetensors")
        merged, assignment = merge_tokens(
            x, schedule=case["schedule"], num_heads=case["num_heads"], return_assignment=True
        )
        torch.testing.assert_close(merged, tensors[case["expected"]], atol=1e-5, rtol=0)
        assert torch.equal(assignment, tensors[case["assignment"]].long())
    assert torch.equal(merge_tokens(x, 30), merge_tokens(x, schedule=FULL[0]["schedule"]))


@pytest.mark.parametrize("case", GOLDEN["derived_schedules"]["cases"], ids=str)
def test_derived_schedules(case):
    assert derive_schedule(case["tokens"], case["num_tokens"]) == case["schedule"]


@pytest.mark.parametrize("similarity", ["mean_head", "per_head"])
@pytest.mark.parametrize(("tokens", "num_tokens"), [(40, 5), (37, 6), (24, 20)])
def test_equal_to_a_slow_reading_of_the_paper(similarity, tokens, num_tokens):
    x = torch.randn(3, tokens, 32, dtype=torch.float64)
    merged, assignment = merge_tokens(x, num_tokens, num_heads=4, similarity=similarity, return_assignment=True)
    for segment, tokens_of_segment, index in zip(x.numpy(), merged.numpy(), assignment, strict=True):
        expected, members = slow_merge(segment, num_tokens, 4, similarity)
        np.testing.assert_allclose(tokens_of_segment, expected, atol=1e-12)
        assert [set(torch.nonzero(index == i).flatten().tolist()) for i in range(num_tokens)] == members


def test_the_two_similarities_differ():
    x = torch.randn(1, 64, 32)
    assert not torch.allclose(merge_tokens(x, 8, num_heads=4), merge_tokens(x, 8, num_heads=4, similarity="per_head"))


@settings(max_examples=60, deadline=None)
@given(
    segments=st.integers(1, 3),
    tokens=st.integers(1, 90),
    num_tokens=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 4]),
    similarity=st.sampled_from(["mean_head", "per_head"]),
    order=st.sampled_from(["matching", "time"]),
    seed=st.integers(0, 2**16),
)
def test_tokens_are_the_means_of_their_patches(segments, tokens, num_tokens, heads, similarity, order, seed):
    x = torch.randn(segments, tokens, 16, generator=torch.Generator().manual_seed(seed))
    merged, assignment = merge_tokens(
        x, num_tokens, num_heads=heads, similarity=similarity, order=order, return_assignment=True
    )
    left = min(tokens, num_tokens)
    assert merged.shape == (segments, left, 16)
    assert assignment.shape == (segments, tokens) and assignment.dtype == torch.int64
    for segment in range(segments):
        for index in range(left):
            patches = x[segment, assignment[segment] == index]
            assert len(patches)
            torch.testing.assert_close(merged[segment, index], patches.mean(0), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 400), schedule=st.lists(st.integers(-3, 200), max_size=8), num_tokens=st.integers(1, 50))
def test_a_schedule_never_merges_more_than_half_nor_below_the_number_asked(tokens, schedule, num_tokens):
    left = tokens
    for r in clip_schedule(schedule, tokens, num_tokens):
        assert 0 < r <= left // 2
        left -= r
    assert left >= min(tokens, num_tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_matches_in_float32(dtype):
    x = (torch.randn(2, 120, 64) * 100).to(dtype)
    merged, assignment = merge_tokens(x, 10, num_heads=4, return_assignment=True)
    exact, exact_assignment = merge_tokens(x.float(), 10, num_heads=4, return_assignment=True)
    assert merged.dtype == dtype
    assert torch.equal(assignment, exact_assignment)
    assert torch.equal(merged, exact.to(dtype))


def test_sums_of_many_half_precision_patches_do_not_overflow():
    x = torch.full((1, 2560, 32), 100.0, dtype=torch.float16)
    assert torch.equal(merge_tokens(x, 1, num_heads=4), x[:, :1])


def test_autocast_does_not_change_what_merges():
    x = torch.randn(1, 200, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = merge_tokens(x, 10, num_heads=4, return_assignment=True)
    assert torch.equal(inside, merge_tokens(x, 10, num_heads=4, return_assignment=True)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["mean_head", "per_head"])
def test_zero_vectors_give_no_nan(dtype, similarity):
    x = torch.randn(1, 50, 32).to(dtype)
    x[:, ::3] = 0
    for values in (x, torch.zeros_like(x)):
        assert merge_tokens(values, 7, num_heads=4, similarity=similarity).isfinite().all()


def test_gradients_reach_every_patch():
    x = torch.randn(2, 60, 32, requires_grad=True)
    merged, assignment = merge_tokens(x, 6, num_heads=4, return_assignment=True)
    merged.sum().backward()
    sizes = torch.stack([torch.bincount(a, minlength=6) for a in assignment])
    expected = (1 / sizes.gather(1, assignment))[..., None].expand_as(x)
    torch.testing.assert_close(x.grad, expected)


def test_order_time_follows_the_frames_and_then_the_places():
    frames, patches = 6, 9
    x = torch.randn(2, frames * patches, 32)
    merged, assignment = merge_tokens(
        x, 8, num_heads=4, order="time", tokens_per_frame=patches, return_assignment=True
    )
    position = torch.arange(frames * patches)
    for tokens, index in zip(merged, assignment, strict=True):
        keys = []
        for i in range(8):
            mine = position[index == i].double()
            keys.append(((mine // patches).mean().item(), (mine % patches).mean().item()))
        assert keys == sorted(keys)
        matching = merge_tokens(x, 8, num_heads=4)
        assert {tuple(t.tolist()) for t in tokens} <= {tuple(t.tolist()) for t in matching.flatten(0, 1)}


def test_a_still_video_merges_the_same_way_every_time():
    still = torch.randn(1, 1, 25, 32).expand(2, 10, 25, 32).flatten(1, 2)  # ties everywhere
    _, first = merge_tokens(still, 30, num_heads=4, return_assignment=True)
    assert torch.equal(first[0], first[1])
    assert torch.equal(merge_tokens(still[:1], 30, num_heads=4, return_assignment=True)[1], first[:1])


def test_segments_do_not_depend_on_their_neighbours():
    x = torch.randn(5, 300, 64)
    merged = merge_tokens(x, 12, num_heads=4)
    for segment in range(5):
        torch.testing.assert_close(merge_tokens(x[segment : segment + 1], 12, num_heads=4)[0], merged[segment])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_tokens": 0}, ["num_tokens", "0"]),
        ({}, ["num_tokens or schedule"]),
        ({"num_tokens": 4, "num_heads": 5}, ["num_heads", "32", "5"]),
        ({"num_tokens": 4, "similarity": "dot"}, ["similarity", "'dot'"]),
        ({"num_tokens": 4, "order": "random"}, ["order", "'random'"]),
        ({"num_tokens": 4, "schedule": [2]}, ["18", "20", "4"]),
    ],
)
def test_impossible_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        merge_tokens(torch.randn(1, 20, 32), **{"num_heads": 4, **arguments})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_empty_input_is_named():
    with pytest.raises(ValueError, match=r"\(0, 20, 32\)"):
        merge_tokens(torch.randn(0, 20, 32), 4)
