"""How a vision encoder is run and read: frames in, patches and frame tokens out.

The method needs little of an encoder: the patches of one hidden state, and one token per frame ([CLS]) of each of the
last E hidden states. So the layers of known encoders are run here, one by one: only what is needed is kept, and no
layer runs after the last one that is read. Other encoders, and those that somebody hooked into, run as a whole.

To add an encoder, put a [`VisionEncoder`] into `ENCODERS`, under its `model_type`. If it sees several frames at once
(a clip), `clip_frames` says so; nothing else in this package needs to know.

Letters: c frames in a chunk, N patches in a frame, d width, E frame tokens.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .pickling_longvlm import is_capturing_hook


class EncodedFrames(NamedTuple):
    """What the method needs of a chunk of frames: `patches` `(c, N, d)`, and `frame_tokens` `(E, c, d)`."""

    patches: Tensor
    frame_tokens: Tensor


@dataclass(frozen=True)
class Reading:
    """
    What to read from an encoder.

    Args:
        feature_layer (`int`): the hidden state to take patches from: 0 (the embeddings) to the number of layers.
        frame_layers (`range`): the hidden states to take frame tokens from; may be empty.
        patches_per_frame (`int`): N.
        resized (`bool`): whether frames have another size than the encoder was trained with.
    """

    feature_layer: int
    frame_layers: range
    patches_per_frame: int
    resized: bool = False

    @classmethod
    def of(cls, config) -> "Reading":
        """What a `LongVLMConfig` asks for."""
        layers = config.vision_config.num_hidden_layers
        return cls(
            feature_layer=config.vision_feature_layer % (layers + 1),
            frame_layers=range(layers + 1 - config.num_global_tokens, layers + 1),
            patches_per_frame=config.patches_per_frame,
            resized=config.image_size is not None,
        )

    @property
    def last_layer(self) -> int:
        """The last hidden state that is read."""
        return max(self.feature_layer, *self.frame_layers) if self.frame_layers else self.feature_layer


class VisionEncoder:
    """
    Any encoder of transformers that takes images, here single frames, and gives one token per patch.

    [CLS] comes first, then register tokens (DINOv2), then the patches. An encoder without [CLS] (SigLIP) has only
    patches; their mean is then the frame token.
    """

    def clip_frames(self, config) -> int:
        """How many frames the encoder with this configuration sees at once; chunks hold a multiple of that."""
        return 1

    def build(self, config) -> nn.Module:
        """The encoder, untrained."""
        return AutoModel.from_config(config)

    def encode(self, tower: nn.Module, frames: Tensor, reading: Reading) -> EncodedFrames:
        """
        Args:
            tower: the encoder.
            frames: `(c, 3, H, W)`, normalised, on the tower's device and in its dtype. If the encoder sees clips, c is
                a multiple of their length, except at a video's end.
            reading: what to read.
        """
        patches, frame_tokens = None, []
        for layer, hidden_state in self.hidden_states(tower, frames, reading):  # (c, tokens, d)
            if layer == reading.feature_layer:
                patches = hidden_state[:, -reading.patches_per_frame :]
            if layer in reading.frame_layers:
                frame_tokens.append(self.frame_token(hidden_state, reading.patches_per_frame))
        assert patches is not None
        none = patches.new_zeros(0, len(frames), patches.shape[-1])
        return EncodedFrames(patches, torch.stack(frame_tokens) if frame_tokens else none)

    def frame_token(self, hidden_state: Tensor, num_patches: int) -> Tensor:
        """`(c, tokens, d)` -> `(c, d)`."""
        if hidden_state.shape[1] == num_patches:
            return hidden_state.mean(1)
        return hidden_state[:, 0].clone()  # a view would keep the whole hidden state in memory

    def hidden_states(self, tower: nn.Module, frames: Tensor, reading: Reading) -> Iterator[tuple[int, Tensor]]:
        """The hidden states that are needed, and perhaps others: number and value `(c, tokens, d)` of each."""
        # Some encoders must be told that frames have another size; only the signature says which.
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            options["interpolate_pos_encoding"] = reading.resized
        yield from enumerate(tower(frames, output_hidden_states=True, return_dict=True, **options).hidden_states)


class KnownEncoder(VisionEncoder):
    """
    An encoder whose layers are run here: embeddings, perhaps a norm, then layer after layer.

    Args:
        class_name (`str`): the class whose layers are known; subclasses and wrappers run as a whole.
        layers (`str`): path of the `ModuleList` of layers in the encoder.
        norm (`str`, *optional*): path of the norm between embeddings and first layer.
        is_dinov2 (`bool`): the embeddings adapt to other frame sizes by themselves, and in older versions of
            transformers the layers take no attention mask.
    """

    def __init__(self, class_name: str, layers: str, norm: str | None = None, is_dinov2: bool = False):
        self.class_name, self.layers, self.norm, self.is_dinov2 = class_name, layers, norm, is_dinov2

    def hidden_states(self, tower: nn.Module, frames: Tensor, reading: Reading) -> Iterator[tuple[int, Tensor]]:
        if type(tower).__name__ != self.class_name or _is_modified(tower):
            yield from super().hidden_states(tower, frames, reading)
            return
        options = {} if self.is_dinov2 else {"interpolate_pos_encoding": reading.resized}
        hidden_state = tower.embeddings(frames, **options)
        if self.norm is not None:
            hidden_state = tower.get_submodule(self.norm)(hidden_state)
        yield 0, hidden_state
        layers = tower.get_submodule(self.layers)
        for number in range(1, reading.last_layer + 1):
            for_frame_token = number == reading.last_layer != reading.feature_layer
            hidden_state = self.run_layer(layers[number - 1], hidden_state, for_frame_token)
            yield number, hidden_state

    def run_layer(self, layer: nn.Module, hidden_state: Tensor, for_frame_token: bool) -> Tensor:
        """
        Args:
            layer: one layer of the encoder.
            hidden_state: `(c, tokens, d)`, the layer's input.
            for_frame_token: only the frame token of the result will be read.
        """
        return layer(hidden_state) if self.is_dinov2 else layer(hidden_state, None)


class CLIPEncoder(KnownEncoder):
    """
    CLIP. If only [CLS] is read of the last layer, it is computed alone there, from the keys and values of all tokens.
    The result is the same.
    """

    def run_layer(self, layer: nn.Module, hidden_state: Tensor, for_frame_token: bool) -> Tensor:
        attention = layer.self_attn
        implementation = attention.config._attn_implementation
        as_a_whole = layer.training or any(map(_is_modified, layer.modules()))
        if not for_frame_token or as_a_whole or implementation not in ("eager", "sdpa"):
            return super().run_layer(layer, hidden_state, for_frame_token)
        heads = (attention.num_heads, attention.head_dim)
        normed = layer.layer_norm1(hidden_state)
        query, key, value = (
            project(tokens).unflatten(-1, heads).transpose(1, 2)  # (c, heads, tokens, d / heads)
            for project, tokens in (
                (attention.q_proj, normed[:, :1]), (attention.k_proj, normed), (attention.v_proj, normed)
            )
        )  # fmt: skip
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        seen, _ = attend(attention, query, key, value, None, scaling=attention.scale, dropout=0.0)
        class_token = hidden_state[:, :1] + attention.out_proj(seen.flatten(2))  # (c, 1, d)
        return class_token + layer.mlp(layer.layer_norm2(class_token))


ENCODERS: dict[str, VisionEncoder] = {
    "clip_vision_model": CLIPEncoder("CLIPVisionModel", "encoder.layers", norm="pre_layrnorm"),
    "siglip_vision_model": KnownEncoder("SiglipVisionModel", "encoder.layers"),
    "dinov2": KnownEncoder("Dinov2Model", "encoder.layer", is_dinov2=True),
    "dinov2_with_registers": KnownEncoder("Dinov2WithRegistersModel", "encoder.layer", is_dinov2=True),
    "vit": KnownEncoder("ViTModel", "layers"),
}
_OTHER = VisionEncoder()


def vision_encoder(config) -> VisionEncoder:
    """How the encoder with this configuration is built, run and read."""
    return ENCODERS.get(config.model_type, _OTHER)


def encode_frames(tower: nn.Module, frames: Tensor, config) -> EncodedFrames:
    """
    Encodes a chunk of frames, and reads what the method needs.

    Args:
        tower: the vision encoder.
        frames: `(c, 3, H, W)`, normalised, on any device.
        config: the `LongVLMConfig`.

    Raises:
        ValueError: the frames do not have the size that the configuration says.
    """
    frames = frames_for(tower, frames, config)
    return vision_encoder(config.vision_config).encode(tower, frames, Reading.of(config))


def frames_for(tower: nn.Module, frames: Tensor, config) -> Tensor:
    """The frames on the tower's device and in its dtype, once their size is checked."""
    size = config.frame_size
    if tuple(frames.shape[-2:]) != size:
        # Some encoders (DINOv2) would take them and give another number of patches.
        raise ValueError(
            f"the frames are {frames.shape[-2]} x {frames.shape[-1]} pixels, but the configuration says {size[0]} x "
            f"{size[1]}: have the video processor resize them, or set image_size"
        )
    return to_device_of(tower, frames).to(tower.dtype)


def to_device_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `module`. If accelerate has offloaded the module, its hook moves the tensor."""
    # There is no parameter where torch's dynamic quantisation has packed them all: it works on the CPU only.
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return tensor if device.type == "meta" else tensor.to(device)


def _is_modified(module: nn.Module) -> bool:
    """Whether somebody relies on the module's own call: hooks (accelerate, FSDP, the user's), or `compile()`."""
    return bool(
        not all(map(is_capturing_hook, module._forward_hooks.values()))
        or module._forward_pre_hooks
        or "forward" in vars(module)  # accelerate overrides the class's method
        or getattr(module, "_compiled_call_impl", None) is not None
    )
