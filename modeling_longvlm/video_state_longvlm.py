"""A video while it is being encoded: frames are appended, features can be read at any time.

It holds only the M tokens of each finished segment, the patches of the unfinished one, and sums of the global tokens,
which become means when they are read. Everything that encodes a video goes through it: `get_video_features`,
`encode_video`, `get_token_assignment`, the engine, live video.

Letters as in `configuration_longvlm.py`: N patches, d width, K, M, E; L tokens of all segments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .plain_numbers import whole_number
from .vision_tower_longvlm import encode_frames, vision_encoder


class LongVLMVideoState:
    """
    One video so far. Made by `model.start_video()`.

    Args:
        model: the [`LongVLMModel`].
        frames_per_segment (`int`, *optional*): K; default: the configuration's.
        keep_assignment (`bool`): remember which local token each patch is merged into; see `assignment`.

    Attributes:
        num_frames (`int`): frames appended so far.
        duration (`float`, *optional*): the video's length in seconds; set it if you know it.
    """

    def __init__(self, model, frames_per_segment: int | None = None, *, keep_assignment: bool = False):
        model.config.validate_method()  # fields may have been changed since the model was made
        self.model = model
        if frames_per_segment is None:
            frames_per_segment = model.config.frames_per_segment
        self.frames_per_segment = whole_number("frames_per_segment", frames_per_segment, 1)
        self.num_frames = 0
        self.duration: float | None = None
        self._times: list[float] | None = []
        self._frames: list[Tensor] = []  # of an incomplete clip, (frames, 3, H, W)
        self._patches: list[Tensor] = []  # of the incomplete segment, (frames, N, d)
        self._merged: list[Tensor] = []  # tokens of complete segments, (segments * M, d)
        self._assignments: list[Tensor] | None = [] if keep_assignment else None  # (frames, N), for the whole video
        self._global_sum: Tensor | float = 0.0  # (E, d), in float32

    def append(self, pixel_values: Tensor, timestamps: Sequence[float] | None = None) -> None:
        """
        Adds frames at the end. How a video is divided over calls makes no difference.

        Args:
            pixel_values (`Tensor` of shape `(frames, 3, H, W)`): normalised frames, on any device.
            timestamps (`list[float]`, *optional*): the time of each frame, in seconds.

        Raises:
            ValueError: the frames do not have the shape that the model needs, or timestamps are missing.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must have shape (frames, channels, height, width), got {tuple(pixel_values.shape)}"
            )
        if timestamps is not None and len(timestamps) != len(pixel_values):
            raise ValueError(f"{len(timestamps)} timestamps were given for {len(pixel_values)} frames: give one each")
        config, num_frames = self.model.config, self.num_frames + len(pixel_values)
        clip = vision_encoder(config.vision_config).clip_frames(config.vision_config)
        chunk_size = max(config.vision_chunk_frames // clip, 1) * clip
        if self._frames:
            pixel_values = torch.cat([*self._frames, pixel_values.to(self._frames[0].device)])
        whole = len(pixel_values) // clip * clip
        # A copy: a view would keep all frames in memory.
        self._frames = [pixel_values[whole:].clone()] if whole < len(pixel_values) else []
        for chunk in pixel_values[:whole].split(chunk_size) if whole else ():
            encoded = encode_frames(self.model.vision_tower, chunk, config)
            # In float32: in half precision, a sum over thousands of frames would lose its small terms.
            self._global_sum = self._global_sum + encoded.frame_tokens.float().sum(1)  # (E, d)
            self._take(encoded.patches)
        if timestamps is None and num_frames > self.num_frames:
            self._times = None
        elif self._times is not None:
            self._times += map(float, () if timestamps is None else timestamps)
        self.num_frames = num_frames

    def _take(self, patches: Tensor) -> None:
        """Adds patches `(frames, N, d)`, and merges the segments that they complete."""
        k = self.frames_per_segment
        self._patches.append(patches)
        if sum(map(len, self._patches)) < k:
            return
        patches = torch.cat(self._patches)
        complete = len(patches) // k * k
        self._merge(patches[:complete].unflatten(0, (-1, k)))
        self._patches = [patches[complete:].clone()] if complete < len(patches) else []

    def _merge(self, segments: Tensor) -> None:
        """Merges segments `(S, K, N, d)`, and adds their tokens at the end."""
        merged, assignment = self.model.merge_segments(segments)  # (S, M, d), (S, K * N)
        if self._assignments is not None:
            first = sum(map(len, self._merged)) + merged.shape[1] * torch.arange(len(merged), device=merged.device)
            self._assignments.append((assignment + first[:, None]).view(-1, segments.shape[2]))
        self._merged.append(merged.flatten(0, 1))

    def features(self):
        """
        The features of all frames so far. More frames may follow: an incomplete segment is merged for this call only.

        Returns:
            [`LongVLMVideoFeatures`] of one video, equal to those of `get_video_features` for the same frames.

        Raises:
            ValueError: no frame was appended yet.
        """
        local_features, global_features = self.tokens()
        return self.model.project_features(
            local_features=(local_features,),
            global_features=global_features[None],
            num_frames=(self.num_frames,),
            duration=(self.duration,),
            frames_per_segment=(self.frames_per_segment,),
            segment_seconds=(self._segment_seconds(),),
        )

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Local `(L, d)` and global features `(E, d)` of all frames so far, before the projector."""
        if not self.num_frames:
            raise ValueError("a video needs at least one frame, got none: append frames first")
        whole = self._with_the_rest() if self._frames or self._patches else self
        local_features = torch.cat(whole._merged)
        assert isinstance(whole._global_sum, Tensor)
        return local_features, (whole._global_sum / self.num_frames).to(local_features.dtype)

    def assignment(self) -> Tensor:
        """`(frames, N)` int64: the index of the local token that each patch was merged into.

        Raises:
            ValueError: the state was made without `keep_assignment`, or no frame was appended yet.
        """
        whole = self._with_the_rest() if self._frames or self._patches else self
        if not whole._assignments:
            raise ValueError("there is no assignment: call start_video(keep_assignment=True), and append frames first")
        return torch.cat(whole._assignments)

    def _with_the_rest(self) -> "LongVLMVideoState":
        """A copy in which the incomplete clip is encoded and the incomplete segment merged, as they are."""
        whole = object.__new__(type(self))
        whole.__dict__.update(self.__dict__)
        whole._patches, whole._merged = list(self._patches), list(self._merged)
        whole._assignments = None if self._assignments is None else list(self._assignments)
        for frames in self._frames:
            encoded = encode_frames(self.model.vision_tower, frames, self.model.config)
            whole._global_sum = whole._global_sum + encoded.frame_tokens.float().sum(1)
            whole._take(encoded.patches)
        if whole._patches:
            whole._merge(torch.cat(whole._patches)[None])  # the last segment may be short
        return whole

    def _segment_seconds(self) -> Tensor | None:
        """`(S, 2)` float64: the times of the first and the last frame of each segment; `None` if unknown."""
        if self._times is None:
            return None
        times, k = self._times, self.frames_per_segment
        spans = [(times[first], times[min(first + k, len(times)) - 1]) for first in range(0, len(times), k)]
        return torch.tensor(spans, dtype=torch.float64)


__all__ = ["LongVLMVideoState"]
