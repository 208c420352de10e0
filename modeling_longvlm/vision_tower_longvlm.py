"""How a vision encoder is run, and how what it gives is read: frames in; patches and a token of each frame out.

The method needs little of an encoder: the patches of one hidden state, and of the last E hidden states one token a
frame ([CLS]). So the layers of known encoders are run here, one by one: only what is needed is kept, and no layer runs
behind the last one that is read. Encoders that are not known, or that others have hooked into, run as a whole.

The door for another encoder is `ENCODERS`: a [`VisionEncoder`] under its `model_type`. One that sees several frames at
once (a clip) says so with `clip_frames`; nothing else in this package needs to know.

Letters: c frames of a chunk, N patches of a frame, d width, E frame tokens.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel


class EncodedFrames(NamedTuple):
    """What the method needs of some frames: `patches` `(c, N, d)`, and `frame_tokens` `(E, c, d)`."""

    patches: Tensor
    frame_tokens: Tensor


@dataclass(frozen=True)
class Reading:
    """
    What is to be read of an encoder.

    Args:
        feature_layer (`int`): the hidden state with the patches, from 0 (the embeddings) to the number of layers.
        frame_layers (`range`): the hidden states with the frame tokens; empty: none.
        patches_per_frame (`int`): N.
        resized (`bool`): frames are not of the size the encoder was trained with.
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
    An encoder that sees each frame by itself, as images, and gives one token a patch: any of transformers.

    [CLS] stands first, register tokens (DINOv2) follow it, patches come last. An encoder without [CLS] (SigLIP) has
    only patches: their mean stands for the frame.
    """

    def clip_frames(self, config) -> int:
        """How many frames the encoder with this configuration sees at once: chunks of frames are cut accordingly."""
        return 1

    def build(self, config) -> nn.Module:
        """The encoder, untrained."""
        return AutoModel.from_config(config)

    def encode(self, tower: nn.Module, frames: Tensor, reading: Reading) -> EncodedFrames:
        """
        Args:
            tower: the encoder.
            frames: `(c, 3, H, W)`, normalised, on the tower's device and in its dtype. Where the encoder sees clips, c
                is a multiple of their length, except at a video's end.
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
        """Numbers and values `(c, tokens, d)` of the hidden states, as far as they are needed."""
        # Only at the forward's signature can be told whether frames of another size have to be announced.
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            options["interpolate_pos_encoding"] = reading.resized
        yield from enumerate(tower(frames, output_hidden_states=True, return_dict=True, **options).hidden_states)


class KnownEncoder(VisionEncoder):
    """
    An encoder whose layers are run here: embeddings, perhaps a norm, then layer after layer.

    Args:
        layers (`str`): path of the `ModuleList` of layers in the encoder.
        norm (`str`, *optional*): path of the norm between embeddings and first layer.
        is_dinov2 (`bool`): the embeddings need not be told of frames of another size, and the layers of older versions
            take no attention mask.
    """

    def __init__(self, layers: str, norm: str | None = None, is_dinov2: bool = False):
        self.layers, self.norm, self.is_dinov2 = layers, norm, is_dinov2

    def hidden_states(self, tower: nn.Module, frames: Tensor, reading: Reading) -> Iterator[tuple[int, Tensor]]:
        if _must_run_as_a_whole(tower):
            yield from super().hidden_states(tower, frames, reading)
            return
        options = {} if self.is_dinov2 else {"interpolate_pos_encoding": reading.resized}
        hidden_state = tower.embeddings(frames, **options)
        if self.norm is not None:
            hidden_state = tower.get_submodule(self.norm)(hidden_state)
        yield 0, hidden_state
        layers, no_mask = tower.get_submodule(self.layers), () if self.is_dinov2 else (None,)
        for number in range(reading.last_layer):
            hidden_state = layers[number](hidden_state, *no_mask)
            yield number + 1, hidden_state


ENCODERS: dict[str, VisionEncoder] = {
    "clip_vision_model": KnownEncoder("encoder.layers", norm="pre_layrnorm"),
    "siglip_vision_model": KnownEncoder("encoder.layers"),
    "dinov2": KnownEncoder("encoder.layer", is_dinov2=True),
    "dinov2_with_registers": KnownEncoder("encoder.layer", is_dinov2=True),
    "vit": KnownEncoder("layers"),
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
        ValueError: the frames have another size than the configuration says.
    """
    frames = frames_for(tower, frames, config)
    return vision_encoder(config.vision_config).encode(tower, frames, Reading.of(config))


def frames_for(tower: nn.Module, frames: Tensor, config) -> Tensor:
    """The frames where the tower computes, in its dtype, if they have the size that it is to be given."""
    size = config.frame_size
    if tuple(frames.shape[-2:]) != size:
        # Some encoders (DINOv2) would take them, and give another number of patches.
        raise ValueError(
            f"the frames are {frames.shape[-2]} x {frames.shape[-1]} pixels, the configuration says {size[0]} x "
            f"{size[1]}: let the video processor resize them, or set image_size"
        )
    return to_device_of(tower, frames).to(tower.dtype)


def to_device_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` where `module` computes. Of a module that accelerate has offloaded, its hook knows where that is."""
    device = next(module.parameters()).device
    return tensor if device.type == "meta" else tensor.to(device)


def _must_run_as_a_whole(tower: nn.Module) -> bool:
    """Whether somebody relies on the tower's own call: hooks (accelerate, FSDP, the user's), or a compiled tower."""
    return bool(
        tower._forward_hooks
        or tower._forward_pre_hooks
        or "forward" in vars(tower)  # accelerate puts its own in the place of the class's
        or getattr(tower, "_compiled_call_impl", None) is not None
        or hasattr(tower, "_orig_mod")
    )
