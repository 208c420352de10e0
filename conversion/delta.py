"""Deltas: LLaVA published some of its models as differences to LLaMA, which was not theirs to publish."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from longvlm.conversion.key_maps import first_few
from longvlm.conversion.weights import TensorInfo, Weights

TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # a row per token of the vocabulary, which a delta may extend
FREQUENCIES = "rotary_emb.inv_freq"  # constants that older files hold; models compute them
ADDED = ("mm_projector.", "vision_tower.")  # parts that LLaMA does not have


def is_delta(weights: Mapping[str, Tensor]) -> bool:
    """
    Whether these are differences between two LLaMA models, and not a model.

    In a difference the rotary frequencies are 0, and the final norm's weights are close to it; in a model they are
    around 1 (1.7 in LLaMA-7B).
    """
    frequencies = next((name for name in weights if name.endswith(FREQUENCIES)), None)
    if frequencies is not None and not weights[frequencies].any():
        return True
    norm = weights.get("model.norm.weight")
    return norm is not None and norm.float().abs().mean().item() < 0.2


class DeltaSum(Mapping[str, Tensor]):
    """
    A base plus a delta: each tensor is summed when it is read, in the delta's dtype.

    Rows of the vocabulary beyond the base's are the delta's own, and so are a projector and a vision tower.

    Raises:
        ValueError: the delta was made for another base.
    """

    def __init__(self, base: Weights, delta: Weights):
        self.base, self.delta = base, delta
        self.infos: dict[str, TensorInfo] = delta.infos
        hint = "the delta was made for another base"
        missing = [name for name in base if name not in delta and FREQUENCIES not in name]
        if missing:
            raise ValueError(
                f"the delta {delta.source} has no {first_few(missing)}, but the base {base.source} does; {hint}"
            )
        for name, info in delta.infos.items():
            if FREQUENCIES in name:
                continue
            if name not in base:
                if not any(part in name for part in ADDED):
                    raise ValueError(
                        f"the base {base.source} has no {name}, but the delta {delta.source} does; {hint}"
                    )
                continue
            before, after = base.infos[name].shape, info.shape
            grows = name in TABLES and len(before) == len(after) and before[1:] == after[1:] and before[0] < after[0]
            if before != after and not grows:
                raise ValueError(
                    f"{name} is {before} in the base {base.source}, but {after} in the delta {delta.source}; {hint}"
                )

    def __getitem__(self, name: str) -> Tensor:
        change = self.delta[name]
        if FREQUENCIES in name or name not in self.base:
            return change
        total, before = change.clone(), self.base[name]
        total[: len(before)] += before.to(total.dtype)
        return total

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)
