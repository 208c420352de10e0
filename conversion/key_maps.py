"""Names of tensors in other code's checkpoints -> names in this package's, as tables.

A table is a sequence of rules, tried in order; the first whose pattern is found decides. A rule is a regular
expression that is replaced within the name, and its replacement, or `None`: the tensor is left out on purpose.
A name that no rule knows has no place here; the converters refuse it rather than lose the tensor.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

KeyMap = Sequence[tuple[str, str | None]]

LLM, PROJECTOR, VISION = "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."

# The released LongVLM code, and LLaVA's of its time (LLaMA with a projector inside).
ORIGINAL: KeyMap = (
    (r"rotary_emb\.inv_freq$", None),  # the model computes them
    (r"^model\.vision_tower\.", None),  # comes from the CLIP model
    (r"^model\.mm_projector\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),
    (r"^(lm_head\.weight)$", r"\1"),
    (r"^model\.(embed_tokens\.weight|norm\.weight|layers\..+)$", LLM + r"\1"),
)

# `mm_projector.bin`: what a training with the released code saves, in its order. The reverse: `TO_MM_PROJECTOR`.
MM_PROJECTOR: KeyMap = (
    (r"^model\.mm_projector\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),
    (r"^model\.(embed_tokens\.weight)$", LLM + r"\1"),
)
TO_MM_PROJECTOR = {
    LLM + "embed_tokens.weight": "model.embed_tokens.weight",
    PROJECTOR + "linear_1.weight": "model.mm_projector.weight",
    PROJECTOR + "linear_1.bias": "model.mm_projector.bias",
}

# LlavaForConditionalGeneration of transformers: as its files have it, and as it is named in memory since 4.52.
LLAVA_TRANSFORMERS: KeyMap = (
    (r"(rotary_emb\.inv_freq|embeddings\.position_ids)$", None),  # constants that older files carry
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)$", VISION + r"\1"),
    (r"^(?:model\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))$", PROJECTOR + r"\1"),
    (r"^language_model\.model\.(.+)$", LLM + r"\1"),
    (r"^model\.language_model\.(.+)$", LLM + r"\1"),
    (r"^(?:language_model\.)?(lm_head\.(?:weight|bias))$", r"\1"),
)

# LlavaLlamaForCausalLM and VideoChatGPTLlamaForCausalLM of the original repositories. A projector saved alone may have
# its names without "model." (`mm_projector.bin` of LLaVA-1.5).
LLAVA_ORIGINAL: KeyMap = (
    (r"(rotary_emb\.inv_freq|embeddings\.position_ids)$", None),
    (r"^(?:model\.)?mm_projector\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),  # Lightning, Video-ChatGPT: linear
    (r"^(?:model\.)?mm_projector\.0\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),  # 1.5: linear, GELU, linear
    (r"^(?:model\.)?mm_projector\.2\.(weight|bias)$", PROJECTOR + r"linear_2.\1"),
    (r"^model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)$", VISION + r"\1"),  # if it was trained
    (r"^(lm_head\.(?:weight|bias))$", r"\1"),
    (r"^model\.(embed_tokens\.weight|norm\.weight|layers\..+)$", LLM + r"\1"),
)

# open_clip's own ViT, without the "visual." in front -> CLIPVisionModel of transformers.
OPEN_CLIP_VISION: KeyMap = (
    (r"^proj$", None),  # from the pooled output to the space shared with text: not part of the tower
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.weight$", "embeddings.patch_embedding.weight"),
    (r"^ln_pre\.(weight|bias)$", r"pre_layrnorm.\1"),  # transformers' spelling
    (r"^ln_post\.(weight|bias)$", r"post_layernorm.\1"),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)$", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)$", r"encoder.layers.\1.self_attn.out_proj.\2"),
    # One tensor there, three here: q, k and v, in this order, replace QKV.
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", r"encoder.layers.\1.self_attn.QKV_proj.\2"),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)$", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)$", r"encoder.layers.\1.mlp.fc2.\2"),
    # Layer scale: a factor for each channel of what a block adds, folded into the linear layer before it.
    (r"^transformer\.resblocks\.(\d+)\.ls_1\.gamma$", r"encoder.layers.\1.self_attn.out_proj.SCALE"),
    (r"^transformer\.resblocks\.(\d+)\.ls_2\.gamma$", r"encoder.layers.\1.mlp.fc2.SCALE"),
)


def map_key(name: str, table: KeyMap) -> str | None:
    """The new name; `None`: left out on purpose.

    Raises:
        KeyError: no rule knows the name.
    """
    for pattern, replacement in table:
        if re.search(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    raise KeyError(name)


def map_names(names: Iterable[str], table: KeyMap, source: str | Path) -> dict[str, str | None]:
    """
    The new name for each name; `None`: left out on purpose.

    Raises:
        ValueError: `source` holds tensors that no rule knows.
    """
    mapped, unknown = {}, []
    for name in names:
        try:
            mapped[name] = map_key(name, table)
        except KeyError:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source} holds {first_few(sorted(unknown))}, which a LongVLM has no place for; is it of another kind?"
        )
    return mapped


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and the number of the others, for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
