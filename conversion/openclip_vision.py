"""Turns the vision tower of an open_clip model into `CLIPVisionModel` of transformers, with its preprocessing.

    convert_open_clip("ViT-L-14", "clip-vit", pretrained="laion2b_s32b_b82k")

Only open_clip's own ViT is supported. Activation, heads and epsilon are read from its configuration, never guessed: a
wrong one hardly shows in the numbers, yet costs accuracy. Only the tower's tensors are read from the file.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from longvlm.conversion.key_maps import OPEN_CLIP_VISION, map_key
from longvlm.conversion.parts import VisionPart, as_dtype
from longvlm.conversion.progress import Progress, silent
from longvlm.conversion.weights import Weights
from longvlm.files import check_free, output_folder, read_json_object

PREFIX = "open_clip:"

# Options of open_clip's ViT that CLIPVisionModel does not have: the value without effect, and what the option is.
_ONLY_WITHOUT = {
    "attentional_pool": (False, "attentional pooling (CoCa)"),
    "no_ln_pre": (False, "no layer norm before its layers (no_ln_pre, CLIPA)"),
    "pool_type": ("tok", "a pooled output that is not the [CLS] token's"),
    "block_type": (None, "blocks of another type"),
    "qk_norm": (False, "normalised queries and keys (qk_norm)"),
    "scaled_cosine_attn": (False, "cosine attention"),
    "scale_heads": (False, "scaled heads"),
    "scale_attn_inner": (False, "a norm inside its attention (scale_attn_inner)"),
    "scale_attn": (False, "a norm after its attention (scale_attn)"),
    "scale_fc": (False, "a norm inside its MLP (scale_fc)"),
}
# Names in a file that show what it holds, whatever model it is said to be.
_SIGNS = {
    "trunk.": "is built from a timm model",
    "attn_pool.": "has attentional pooling (CoCa)",
    "layer1.": "is a ResNet",
}

# As open_clip names its files on the Hub.
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass
class _Source:
    name: str  # of the model and its weights, without a path of this machine
    model: dict[str, Any]  # open_clip's configuration of the whole model
    preprocess: dict[str, Any]
    file: Path


def convert_open_clip(
    model: str,
    out: str | Path,
    *,
    pretrained: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    allow_torchscript: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """
    Writes the vision tower of an open_clip model as a folder that `AutoModel` and `assemble` load.

    Args:
        model: open_clip's name of the architecture, for example "ViT-L-14" or "ViT-B-32-quickgelu".
        out: folder to write; it appears only once it is complete.
        pretrained: a tag that open_clip downloads ("openai", "laion2b_s32b_b82k"...); or a file: safetensors, or a
            state dict that `torch.save` wrote; or a folder as open_clip writes it for the Hub. A tag also says
            which activation and which preprocessing the weights were trained with, and so does an
            `open_clip_config.json` beside the file. Without one, the activation is the one that the architecture's
            name says, and mean and standard deviation are OpenAI's.
        dtype: of the weights; `None` or "auto": as saved (float32 if there are several).
        allow_torchscript: also read TorchScript archives, such as OpenAI's first `.pt` files. They can run code.
        overwrite: replace a folder that is not empty.
        progress: called as `progress(stage)` at each step.

    Returns:
        `out` as a path.

    Raises:
        ValueError: `CLIPVisionModel` cannot represent the tower, or the weights do not fit.
        OSError: the weights cannot be downloaded, or the folder cannot be written.
        ImportError: open_clip is not installed.
    """
    progress = progress or silent
    out = check_free(out, overwrite=overwrite)
    progress("reading the vision tower")
    part = load_open_clip(model, pretrained, dtype=as_dtype(dtype), allow_torchscript=allow_torchscript)
    progress("writing")
    # A name only: no path of this machine is published.
    part.model.config._name_or_path = part.name
    with output_folder(out, overwrite=overwrite) as folder:
        part.model.save_pretrained(folder)
        CLIPImageProcessor(**part.image_options).save_pretrained(folder)
    return Path(out)


def load_open_clip(
    model: str,
    pretrained: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    allow_torchscript: bool = False,
) -> VisionPart:
    """The vision tower of an open_clip model, in memory; see [`convert_open_clip`]."""
    source = _find(model, pretrained)
    _check_representable(source)
    weights = Weights(source.file, allow_torchscript=allow_torchscript)
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""  # DistributedDataParallel's
    quick_gelu = bool(source.model.get("quick_gelu"))
    if f"{prefix}input_resolution" in weights:
        quick_gelu = True  # only OpenAI's own archives have this tensor, and all of OpenAI's models have QuickGELU
    config = _config(source, quick_gelu)
    state = _state_dict(source, weights, f"{prefix}visual.", config)
    if dtype is None:
        dtypes = {tensor.dtype for tensor in state.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    # Not load_state_dict: a model would be filled with random weights first, which takes minutes for a large tower.
    tower = CLIPVisionModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return VisionPart(tower.eval(), source.name, _image_options(source))


def load_open_clip_by_name(name: str, *, dtype: torch.dtype | None = None) -> VisionPart:
    """As [`load_open_clip`], from one string: `open_clip:MODEL/TAG_OR_FILE`."""
    model, _, pretrained = name.removeprefix(PREFIX).partition("/")
    return load_open_clip(model, pretrained or None, dtype=dtype)


def _find(model: str, pretrained: str | Path | None) -> _Source:
    """Where the weights are, and the configuration that they were trained with."""
    try:
        import open_clip
    except ImportError:
        raise ImportError("open_clip is not installed: pip install open_clip_torch") from None
    config = open_clip.get_model_config(model)
    if not pretrained:
        if config is None:
            raise ValueError(_unknown(model, open_clip.list_models()))
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none is published"
        raise ValueError(f"no weights were named for {model}; give a file, or one of open_clip's tags ({tags})")

    file = Path(pretrained)
    tag = open_clip.get_pretrained_cfg(model, str(pretrained))
    if tag:
        name, preprocess = f"{PREFIX}{model}/{pretrained}", dict(tag)
        # What the weights were trained with: open_clip itself only warns where its model's name says otherwise.
        config = {**config, "quick_gelu": tag.get("quick_gelu", config.get("quick_gelu", False))}
        _check_representable(_Source(name, config, preprocess, file))  # before gigabytes are downloaded
        file = Path(_download(open_clip, tag, name))
        return _Source(name, config, preprocess, file)
    if file.is_dir():
        file = next((file / name for name in _HUB_FILES if (file / name).is_file()), file)
    if config is None and not file.is_file():
        raise ValueError(_unknown(model, open_clip.list_models()))
    if not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(
            f"{pretrained} is neither a file nor a tag that open_clip knows for {model} (it knows: {tags})"
        )
    preprocess = {}
    beside = file.parent / "open_clip_config.json"
    if beside.is_file():
        own = _read_description(beside)
        if config is not None and own["model_cfg"]["vision_cfg"] != config["vision_cfg"]:
            raise ValueError(
                f"{beside} describes another vision tower than {model}; give the name of its architecture"
            )
        config, preprocess = own["model_cfg"], own.get("preprocess_cfg", {})
    if config is None:
        raise ValueError(_unknown(model, open_clip.list_models()))
    return _Source(f"{PREFIX}{model}/{file.name}", config, preprocess, file)


def _read_description(file: Path) -> dict[str, Any]:
    try:
        values = read_json_object(file)
        values["model_cfg"]["vision_cfg"], values["model_cfg"]["embed_dim"]  # what is read of it
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file} is not a description by open_clip: expected model_cfg with vision_cfg and embed_dim"
        ) from None
    return values


def _download(open_clip, tag: dict[str, Any], name: str) -> str:
    try:
        return open_clip.download_pretrained(tag)
    except Exception as error:  # whatever the network or the Hub's client raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{name} cannot be downloaded ({reason[:200]}); give a local file instead") from error


def _unknown(model: str, known: list[str]) -> str:
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f'open_clip knows no model "{model}"{hint}'


def _check_representable(source: _Source) -> None:
    vision, name = source.model["vision_cfg"], source.name
    if vision.get("timm_model_name"):
        raise _refusal(name, f"is built from timm's {vision['timm_model_name']}")
    if not isinstance(vision.get("layers", 12), int):
        raise _refusal(name, "is a ResNet")
    for option, (harmless, what) in _ONLY_WITHOUT.items():
        if vision.get(option, harmless) != harmless:
            raise _refusal(name, f"has {what}")
    for option in ("image_size", "patch_size"):
        if len(set(_pair(vision.get(option, 16)))) != 1:
            raise _refusal(name, f"has {option} {tuple(vision[option])}, which is not square")
    unknown_norm = set(vision.get("norm_kwargs") or {}) - {"eps"}
    if unknown_norm:
        raise _refusal(name, f"has layer norms with {', '.join(sorted(unknown_norm))}")
    _activation(source, False)
    if source.preprocess.get("resize_mode") == "longest":
        raise ValueError(
            f'{name} needs images padded to a square (resize_mode "longest"), which is not supported; give a model '
            "with another resize_mode"
        )


def _refusal(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name}: its vision tower {what}; CLIPVisionModel of transformers cannot represent it; give one of "
        "open_clip's own ViTs with a layer norm before its layers and a [CLS] token, such as ViT-L-14"
    )


def _activation(source: _Source, quick_gelu: bool) -> str:
    options = dict(source.model["vision_cfg"].get("act_kwargs") or {})
    approximate = options.pop("approximate", "none")
    if options or approximate not in ("none", "tanh"):
        raise _refusal(source.name, f"has an activation with {source.model['vision_cfg']['act_kwargs']}")
    if quick_gelu:
        return "quick_gelu"
    return "gelu_pytorch_tanh" if approximate == "tanh" else "gelu"


def _config(source: _Source, quick_gelu: bool) -> CLIPVisionConfig:
    # Defaults as in open_clip's CLIPVisionCfg.
    vision = source.model["vision_cfg"]
    width = vision.get("width", 768)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision.get("layers", 12),
        num_attention_heads=width // vision.get("head_width", 64),
        image_size=_pair(vision.get("image_size", 224))[0],
        patch_size=_pair(vision.get("patch_size", 16))[0],
        projection_dim=source.model["embed_dim"],
        hidden_act=_activation(source, quick_gelu),
        layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def _state_dict(source: _Source, weights: Weights, prefix: str, config: CLIPVisionConfig) -> dict[str, torch.Tensor]:
    """The tower's tensors under their names in transformers; every tensor is accounted for."""
    own = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    for sign, what in _SIGNS.items():
        if any(name.startswith(sign) for name in own):
            raise _refusal(source.name, what)
    if not own:
        raise ValueError(f"{source.file} contains no vision tower of open_clip (tensors named visual.*)")
    if "ln_pre.weight" not in own:
        raise _refusal(source.name, "has no layer norm before its layers (CLIPA)")

    state: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    for name, full_name in own.items():
        try:
            target = map_key(name, OPEN_CLIP_VISION)
        except KeyError:
            raise _refusal(source.name, f"has a tensor without a place in it, {name}") from None
        if target is None:
            continue
        tensor = weights[full_name]
        if target.endswith(".SCALE"):
            factors[target.removesuffix(".SCALE")] = tensor
        elif "QKV" in target:
            state |= {
                target.replace("QKV", part): value.clone() for part, value in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            state[target] = tensor

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CLIPVisionModel(config).state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{source.name} does not fit its architecture: {name} has shape {shapes.get(name, 'none')}, expected "
                f"{expected.get(name, 'none')}; is it the right architecture name?"
            )
    for layer, factor in factors.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            tensor = state[name].float()
            scaled = factor.float()[:, None] * tensor if tensor.ndim == 2 else factor.float() * tensor
            state[name] = scaled.to(state[name].dtype)
    return state


def _image_options(source: _Source) -> dict[str, Any]:
    """How open_clip prepares images for these weights, as options of a transformers image processor."""
    preprocess = source.preprocess
    side = _pair(source.model["vision_cfg"].get("image_size", 224))[0]
    squash = preprocess.get("resize_mode") == "squash"
    bilinear = preprocess.get("interpolation") == "bilinear"
    square = {"height": side, "width": side}
    options: dict[str, Any] = {
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": PILImageResampling.BILINEAR if bilinear else PILImageResampling.BICUBIC,
        "do_center_crop": not squash,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _triple(preprocess.get("mean") or OPENAI_CLIP_MEAN),
        "image_std": _triple(preprocess.get("std") or OPENAI_CLIP_STD),
    }
    return options if squash else {**options, "crop_size": square}


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _triple(value) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * 3
