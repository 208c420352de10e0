"""Names of tensors in other code's checkpoints -> names in this package's, as tables.

A table is a sequence of rules, tried from the top; the first whose pattern is found decides. A rule is a regular
expression that is replaced within the name, and what replaces it, or `None`: the tensor is left out on purpose.
A name that no rule knows has no place here; the converters refuse it rather than lose it.
"""

import re
from collections.abc import Sequence

KeyMap = Sequence[tuple[str, str | None]]

LLM, PROJECTOR, VISION = "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."

# The released LongVLM code, and LLaVA's of its time (LLaMA with a projector inside).
ORIGINAL: KeyMap = (
    (r"rotary_emb\.inv_freq$", None),  # computed anew; zeros in a delta
    (r"^model\.vision_tower\.", None),  # comes from the CLIP model
    (r"^model\.mm_projector\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),
    (r"^(lm_head\.weight)$", r"\1"),
    (r"^model\.(embed_tokens\.weight|norm\.weight|layers\..+)$", LLM + r"\1"),
)

# `mm_projector.bin`: what the released code saves of a training, in its order. The other way: `TO_MM_PROJECTOR`.
MM_PROJECTOR: KeyMap = (
    (r"^model\.mm_projector\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),
    (r"^model\.(embed_tokens\.weight)$", LLM + r"\1"),
)
TO_MM_PROJECTOR = {
    LLM + "embed_tokens.weight": "model.embed_tokens.weight",
    PROJECTOR + "linear_1.weight": "model.mm_projector.weight",
    PROJECTOR + "linear_1.bias": "model.mm_projector.bias",
}


def map_key(name: str, table: KeyMap) -> str | None:
    """The new name; `None`: left out on purpose.

    Raises:
        KeyError: no rule knows the name.
    """
    for pattern, replacement in table:
        if re.search(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    raise KeyError(name)
