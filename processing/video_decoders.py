"""Videos that someone else's decoder reads: torchcodec's `VideoDecoder`, whose file is unknown here."""

import copy
from collections.abc import Iterator

import numpy as np

from .video_decoding import DecodedVideo, FrameMetadata


def is_video_decoder(video) -> bool:
    return hasattr(video, "get_frames_at") and hasattr(video, "metadata")


def describe_decoder(decoder) -> FrameMetadata:
    """What a decoder says about its video. Of the times, it tells only the rate: they are index / rate."""
    told = decoder.metadata
    return FrameMetadata(
        total_num_frames=len(decoder),
        fps=told.average_fps,
        width=told.width,
        height=told.height,
        duration=told.duration_seconds,
        video_backend="torchcodec",
    )


def iter_decoder(
    decoder, sample_indices_fn, *, frames_per_piece=None, transform=None, progress=None
) -> Iterator[DecodedVideo]:
    """As `video_decoding.iter_video`. The timestamps of the frames are those that the decoder returns with them."""
    metadata = describe_decoder(decoder)
    chosen = [int(i) for i in sample_indices_fn(metadata)]
    times = np.arange(len(decoder)) / (metadata.fps or float("nan"))
    size = frames_per_piece or max(len(chosen), 1)
    for start in range(0, len(chosen), size):
        taken = chosen[start : start + size]
        frames = {}
        for index in sorted(set(taken)):  # one by one: together, they would be in memory at full size
            batch = decoder.get_frames_at([index])
            frame = batch.data[0].cpu()
            frame = frame if frame.shape[0] == 3 else frame.movedim(-1, 0)  # whatever its dimension_order is
            frames[index] = transform(frame) if transform else frame
            times[index] = float(batch.pts_seconds[0])
            if progress is not None:
                done = start + sum(i <= index for i in taken)
                progress("decode", done, len(chosen))
        piece = copy.copy(metadata)
        piece.frames_indices, piece.source_timestamps = taken, times.copy()
        yield DecodedVideo([frames[i] for i in taken], piece)
