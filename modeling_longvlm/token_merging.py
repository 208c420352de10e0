"""Hierarchical token merging: how LongVLM condenses a segment of a video to a few tokens (paper, section 3.2).

Pure functions on tensors; nothing here knows models or configurations. One step is bipartite soft matching (ToMe):
each token at an even position finds its most similar partner among those at odd positions, and the `r` most similar
pairs merge. Steps repeat, usually halving, until `num_tokens` are left.

Note: the steps only decide WHICH tokens merge. They run in a small "matching space"; the full-width features are
read once, at the end, when each output token becomes the mean of the patches assigned to it. Averaging at every step,
weighted by size, gives the same means.

Letters: S segments, T tokens in a segment (K frames x N patches), d width, C heads, M tokens left.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .plain_numbers import whole_number

SIMILARITIES = ("mean_head", "per_head")
ORDERS = ("matching", "time")


def derive_schedule(tokens: int, num_tokens: int) -> list[int]:
    """How many pairs each step merges: halve while at least `num_tokens` remain, then merge the rest.

    `derive_schedule(2560, 30)` is the paper's schedule, `[1280, 640, 320, 160, 80, 40, 10]`.

    Args:
        tokens: tokens in a segment.
        num_tokens: tokens to be left; if that is `tokens` or more, nothing merges.

    Raises:
        ValueError: either is less than 1.
    """
    tokens, num_tokens = whole_number("tokens", tokens, 1), whole_number("num_tokens", num_tokens, 1)
    schedule = []
    while tokens > num_tokens:
        schedule.append(min(tokens // 2, tokens - num_tokens))
        tokens -= schedule[-1]
    return schedule


def clip_schedule(schedule: list[int], tokens: int, num_tokens: int = 1) -> list[int]:
    """What `schedule` really merges of `tokens` tokens: at most half in a step, and never below `num_tokens`.

    Steps that merge nothing are left out, also those with `r <= 0` (as in the released code).
    `tokens - sum(clip_schedule(schedule, tokens))` tokens remain.
    """
    clipped = []
    for r in schedule:
        r = min(r, tokens // 2, tokens - num_tokens)
        if r > 0:
            clipped.append(r)
            tokens -= r
    return clipped


def merge_tokens(
    hidden_states: Tensor,
    num_tokens: int | None = None,
    schedule: list[int] | None = None,
    num_heads: int = 16,
    similarity: str = "mean_head",
    order: str = "matching",
    return_assignment: bool = False,
    tokens_per_frame: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merges the tokens of each segment into `num_tokens` tokens; each is the mean of the tokens assigned to it.

    Which tokens merge is decided in float32 (float64 for float64 input), without gradients; they flow through the
    means.

    Args:
        hidden_states: `(segments, tokens, width)`, any floating dtype; a segment's tokens frame by frame.
        num_tokens: tokens left of each segment; if that is `tokens` or more, nothing merges. May be omitted if
            `schedule` is given. With both, the schedule stops at `num_tokens`.
        schedule: pairs merged in each step, at most half of the tokens; default: that of `derive_schedule`.
        num_heads: C, the number of slices of the width whose similarities are averaged.
        similarity: `"mean_head"` averages the head slices and takes one cosine of the means (the released code);
            `"per_head"` averages the cosines of the heads (the paper's equation 1).
        order: `"matching"` leaves the tokens in the order of the last step: unmerged even positions by decreasing
            similarity, then the odd positions (the released code). `"time"` sorts them, once, by the mean frame, then
            the mean place within the frame, of the input tokens merged into them.
        return_assignment: also return the output index of every input token.
        tokens_per_frame: N, for `order="time"`.

    Returns:
        `(segments, num_tokens, width)` in the input's dtype; with `return_assignment` also `(segments, tokens)` int64.

    Raises:
        ValueError: an argument is impossible; the message names it, its value and the limit.
    """
    num_heads = whole_number("num_heads", num_heads, 1)
    if num_tokens is not None:
        num_tokens = whole_number("num_tokens", num_tokens, 1)
    if schedule is not None:
        schedule = [whole_number("each step of schedule", r) for r in schedule]
    _check_arguments(hidden_states, num_tokens, schedule, num_heads, similarity, order)
    tokens = hidden_states.shape[1]
    if schedule is None:
        schedule = derive_schedule(tokens, num_tokens)
    else:
        schedule = clip_schedule(schedule, tokens, num_tokens or 1)
    tokens_left = tokens - sum(schedule)
    if num_tokens is not None and tokens_left > num_tokens:
        raise ValueError(
            f"schedule leaves {tokens_left} of {tokens} tokens, but num_tokens is {num_tokens}: merge more pairs, or "
            "leave num_tokens out"
        )

    merged, assignments = [], []
    # Matching in half precision would merge other tokens.
    with torch.autocast(hidden_states.device.type, enabled=False):
        for x in hidden_states.split(_segments_at_a_time(hidden_states)):  # (s, T, d)
            assignment = _match(x, schedule, num_heads, similarity)  # (s, T)
            if order == "time":
                assignment = _sort_by_time(assignment, tokens_left, tokens_per_frame)
            merged.append(_average(x, assignment, tokens_left))  # (s, M, d)
            assignments.append(assignment)
    return (torch.cat(merged), torch.cat(assignments)) if return_assignment else torch.cat(merged)


def check_method(width: int, num_heads: int, similarity: str, order: str, prefix: str = "") -> None:
    """Refuses a way of merging that tokens of this width cannot be merged in.

    Args:
        width, num_heads, similarity, order: see `merge_tokens`.
        prefix: what the caller's own names of these arguments begin with; the errors name those.

    Raises:
        ValueError: names argument, value and limit.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"{prefix}similarity must be {_either(SIMILARITIES)}, got {similarity!r}")
    if order not in ORDERS:
        raise ValueError(f"{prefix}order must be {_either(ORDERS)}, got {order!r}")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{prefix}num_heads must divide the width of the features, {width}, got {num_heads}")


def _check_arguments(hidden_states: Tensor, num_tokens, schedule, num_heads: int, similarity: str, order: str) -> None:
    if hidden_states.ndim != 3 or 0 in hidden_states.shape:
        raise ValueError(
            "hidden_states must have shape (segments, tokens, width), none of them 0, got "
            f"{tuple(hidden_states.shape)}"
        )
    if not hidden_states.is_floating_point():
        raise ValueError(f"hidden_states must be floating point, got {hidden_states.dtype}")
    if num_tokens is None and schedule is None:
        raise ValueError("merge_tokens needs num_tokens or schedule, got neither")
    check_method(hidden_states.shape[-1], num_heads, similarity, order)


def _either(choices: tuple[str, ...]) -> str:
    return " or ".join(map(repr, choices))


def _segments_at_a_time(hidden_states: Tensor) -> int:
    """How many segments are matched at once. The first step's scores are by far the largest thing in memory."""
    tokens, on_cpu = hidden_states.shape[1], hidden_states.device.type == "cpu"
    scores_per_segment = ((tokens + 1) // 2) ** 2  # even positions x odd positions
    # 16 MiB of float32 scores stay near a CPU's cache; 256 MiB make few, large launches on an accelerator.
    return max(1, (1 << 22 if on_cpu else 1 << 26) // scores_per_segment)


@torch.no_grad()
def _match(x: Tensor, schedule: list[int], num_heads: int, similarity: str) -> Tensor:
    """`(S, T, d)` -> `(S, T)` int64: the index that each token ends at after all steps."""
    segments, tokens, _ = x.shape
    # A merged token is the size-weighted mean of its parts. A cosine ignores a vector's length, so the plain SUM of
    # the parts will do, and sizes need not be kept. The mean over heads is linear, so it is taken once, at the start.
    sums = x.unflatten(-1, (num_heads, -1))  # (S, T, C, d/C)
    dtype = _at_least_float32(x)
    sums = sums.mean(-2, dtype=dtype) if similarity == "mean_head" else sums.flatten(-2).to(dtype)
    heads = 1 if similarity == "mean_head" else num_heads
    assignment = torch.arange(tokens, device=x.device).expand(segments, tokens)  # (S, T)
    for r in schedule:
        sums, destination = _merge_step(sums, r, heads)
        assignment = destination.gather(1, assignment)
    return assignment


def _merge_step(sums: Tensor, r: int, heads: int) -> tuple[Tensor, Tensor]:
    """Merges the `r` most similar pairs of `(S, n, w)`: `(S, n - r, w)`, and where each token went, `(S, n)`."""
    segments, tokens, width = sums.shape
    # A zero vector has no direction: its similarity to everything is 0, not NaN.
    directions = F.normalize(sums.unflatten(-1, (heads, -1)), dim=-1).flatten(-2)  # (S, n, w)
    scores = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # (S, ceil(n/2), floor(n/2)); heads x the mean
    partner = scores.argmax(-1)  # (S, ceil(n/2)); the first of equals, on every device
    best = scores.gather(-1, partner[..., None]).squeeze(-1)
    del scores
    ranking = best.argsort(dim=-1, descending=True, stable=True)
    merging, staying = ranking[:, :r], ranking[:, r:]
    num_staying = staying.shape[1]

    # New order, as in the released code: the even positions that stay, most similar first, then the odd positions.
    destination = torch.empty(segments, tokens, dtype=torch.long, device=sums.device)
    destination[:, 1::2] = torch.arange(num_staying, tokens - r, device=sums.device)
    of_even = torch.empty_like(ranking)
    of_even.scatter_(1, staying, torch.arange(num_staying, device=sums.device).expand(segments, -1))
    of_even.scatter_(1, merging, partner.gather(1, merging) + num_staying)
    destination[:, ::2] = of_even

    target = destination[..., None].expand(-1, -1, width)
    return sums.new_zeros(segments, tokens - r, width).scatter_add_(1, target, sums), destination


def _average(x: Tensor, assignment: Tensor, num_tokens: int) -> Tensor:
    """Means of the tokens that share an index: `(S, T, d)`, `(S, T)` -> `(S, M, d)`, summed in float32."""
    if num_tokens == x.shape[1]:
        # Nothing merged; only the order may have changed.
        return torch.empty_like(x).scatter(1, assignment[..., None].expand_as(x), x)
    dtype = _at_least_float32(x)
    sizes = x.new_zeros(x.shape[0], num_tokens, dtype=dtype)
    sizes.scatter_add_(1, assignment, torch.ones_like(assignment, dtype=dtype))  # (S, M)
    if x.device.type == "cpu":
        index = assignment + num_tokens * torch.arange(x.shape[0])[:, None]  # (S, T)
        sums = x.new_zeros(sizes.numel(), x.shape[-1], dtype=dtype)
        sums = sums.index_add(0, index.flatten(), x.flatten(0, 1).to(dtype)).view(*sizes.shape, -1)  # (S, M, d)
    else:
        # A product with zeros and ones gives the same sums on every run; scattered additions on an accelerator do not.
        sums = F.one_hot(assignment, num_tokens).transpose(1, 2).to(dtype) @ x.to(dtype)  # (S, M, d)
    return (sums / sizes[..., None]).to(x.dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sort_by_time(assignment: Tensor, num_tokens: int, tokens_per_frame: int) -> Tensor:
    """Renumbers `(S, T)` so that output tokens are sorted by the mean frame, then the mean place, of their parts."""
    segments, tokens = assignment.shape
    position = torch.arange(tokens, device=assignment.device).expand(segments, tokens)
    zeros = torch.zeros(segments, num_tokens, device=assignment.device)
    sizes = zeros.scatter_add(1, assignment, torch.ones_like(position, dtype=zeros.dtype))

    def mean(values: Tensor) -> Tensor:
        return zeros.scatter_add(1, assignment, values.to(zeros.dtype)) / sizes  # (S, M)

    # Two stable sorts, the less important key first.
    by_place = mean(position % tokens_per_frame).argsort(dim=1, stable=True)
    by_time = mean(position // tokens_per_frame).gather(1, by_place).argsort(dim=1, stable=True)
    return by_place.gather(1, by_time).argsort(dim=1).gather(1, assignment)
