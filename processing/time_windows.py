"""A part of a video by time: the frames with `video_start` <= time < `video_end`, in seconds from the first frame.

The rule that samples frames works on these as if they were the whole video; indices and timestamps remain those of the
whole.
"""

import copy

import numpy as np


def frames_in_window(metadata, video_start: float | None, video_end: float | None) -> range:
    """
    The frames that lie in a window, as a range of indices.

    Args:
        metadata: `FrameMetadata`, or `VideoMetadata` whose frames are shown at a constant rate.
        video_start, video_end: in seconds; `None`: the start and the end of the video. An end past the video counts as
            the video's end.

    Raises:
        ValueError: the times of the frames are unknown, or none of them lies in the window.
    """
    total = metadata.total_num_frames
    if video_start is None and video_end is None:
        return range(total)
    times = _times(metadata)
    if times is None:
        name = "video_end" if video_start is None else "video_start"
        raise ValueError(
            f"`{name}` selects by time, but the frame rate of the video is unknown; "
            'pass video_metadata={"total_num_frames": ..., "fps": ...} or leave it out'
        )
    start_time = getattr(metadata, "start_time", None)
    seconds = times - (times[0] if start_time is None else start_time)
    # 1e-6 s: rounding must not choose a neighbour.
    first = 0 if video_start is None else int(np.searchsorted(seconds, video_start - 1e-6))
    stop = total if video_end is None else int(np.searchsorted(seconds, video_end - 1e-6))
    if first == total:
        length = getattr(metadata, "duration", None)
        end = f" and ends at {length:.6g}" if length is not None else ""
        raise ValueError(
            f"`video_start` {video_start:.6g} is past the end of the video, which shows its last frame at "
            f"{seconds[-1]:.6g}{end} seconds; choose an earlier start"
        )
    if first >= stop:
        before = f"{seconds[first - 1]:.6g} and " if first else ""
        raise ValueError(
            f"no frame lies from `video_start` {video_start or 0:.6g} to `video_end` {video_end:.6g}: the nearest are "
            f"at {before}{seconds[first]:.6g} seconds; choose a wider window"
        )
    return range(first, stop)


def part_of_video(metadata, window: range):
    """Metadata of the frames in a window, as if they were a whole video."""
    if len(window) == metadata.total_num_frames:
        return metadata
    part, times = copy.copy(metadata), getattr(metadata, "source_timestamps", None)
    part.total_num_frames = len(window)
    if times is not None:
        part.source_timestamps = np.asarray(times)[window.start : window.stop]
    return part


def _times(metadata) -> np.ndarray | None:
    times = getattr(metadata, "source_timestamps", None)
    if times is not None:
        return np.asarray(times, dtype=np.float64)
    return np.arange(metadata.total_num_frames) / metadata.fps if metadata.fps else None
