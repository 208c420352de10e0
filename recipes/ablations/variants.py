"""What is compared: ways to turn a video's patch tokens and [CLS] tokens into what the language model gets.

Every variant starts from the same hidden states of the same encoder. "longvlm" is the paper's method at a small size:
100 frames, segments of 10, 10 tokens each, halving, the released similarity and order, 4 global tokens before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longvlm.modeling_longvlm.token_merging import merge_tokens
from recipes.tiny.recipe import gentle_schedule

NUM_HEADS = 4


@dataclass(frozen=True)
class Variant:
    """`pooling`: "merge", "frame mean", "spatial + temporal" (Video-ChatGPT) or "none". Letters as in the paper."""

    name: str
    title: str
    pooling: str = "merge"
    k: int = 10
    m: int = 10
    e: int = 4
    similarity: str = "mean_head"
    order: str = "matching"
    gentle: bool = False  # a tenth of the tokens merges in a step, instead of half
    main: bool = False  # of the paper's main claim: run with several seeds


VARIANTS: Sequence[Variant] = (
    Variant("longvlm", "local + global (LongVLM)", main=True),
    Variant("local", "local only", e=0, main=True),
    Variant("global", "global only", pooling="none", main=True),
    Variant("mean", "mean pooling of each frame + global", pooling="frame mean", main=True),
    Variant("pooled", "spatial + temporal pooling (Video-ChatGPT)", pooling="spatial + temporal", e=0, main=True),
    Variant("text", "no video", pooling="none", e=0),
    Variant("per-head", "similarity of the paper's equation 1", similarity="per_head"),
    Variant("time", "tokens of a segment in order of time", order="time"),
    Variant("gentle", "a tenth merges in each step", gentle=True),
    Variant("m5", "M = 5", m=5),
    Variant("m30", "M = 30", m=30),
    Variant("k5", "K = 5, M = 5 (as many tokens)", k=5, m=5),
    Variant("k20", "K = 20, M = 20 (as many tokens)", k=20, m=20),
    Variant(
        "tiny", "as longvlm-tiny: K = 2, M = 3, gentle, in order of time", k=2, m=3, e=2, gentle=True, order="time"
    ),
)


def condense(variant: Variant, patches: Tensor, class_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        patches: `(T, N, d)`, a video's patch tokens; N is a square.
        class_tokens: `(layers, T, d)`, its [CLS] tokens, the last layer last.

    Returns:
        Local tokens `(L, d)` in order of time, and those that stand before them `(E, d)`.
    """
    width = patches.shape[-1]
    means = class_tokens.mean(1)  # (layers, d)
    global_tokens = means[len(means) - variant.e :]
    if variant.pooling == "none":
        return patches.new_zeros(0, width), global_tokens
    if variant.pooling == "frame mean":
        return patches.mean(1), global_tokens
    if variant.pooling == "spatial + temporal":
        # Two frames a temporal token and 7 x 7 places: 99 tokens, as many as the others have.
        side = round(patches.shape[1] ** 0.5)
        picture = patches.mean(0).mT.unflatten(-1, (side, side))  # (d, 8, 8)
        spatial = F.adaptive_avg_pool2d(picture, 7).flatten(1).mT  # (49, d)
        return patches.mean(1).unflatten(0, (-1, 2)).mean(1), spatial
    segments = patches.unflatten(0, (-1, variant.k)).flatten(1, 2)  # (S, K * N, d)
    merged = merge_tokens(
        segments,
        num_tokens=variant.m,
        schedule=gentle_schedule(segments.shape[1], variant.m) if variant.gentle else None,
        num_heads=NUM_HEADS,
        similarity=variant.similarity,
        order=variant.order,
        tokens_per_frame=patches.shape[1],
    )
    assert isinstance(merged, Tensor)
    return merged.flatten(0, 1), global_tokens


def num_tokens(variant: Variant, num_frames: int = 100, num_patches: int = 64, width: int = 8) -> int:
    """Tokens that a video becomes."""
    parts = condense(variant, torch.rand(num_frames, num_patches, width), torch.rand(4, num_frames, width))
    return sum(map(len, parts))
