"""Videos made at test time, in many containers; their frames show their own number, see `numbered_videos`."""

import av
import numpy as np

from benchmarks.numbered_videos import HEIGHT, WIDTH, numbered_frame, read_number, write_video
from longvlm.processing import video_reader

__all__ = [
    "CONTAINERS",
    "HEIGHT",
    "WIDTH",
    "count_decoded",
    "numbered_frame",
    "read_number",
    "uneven_times",
    "write_container",
    "write_sound",
    "write_video",
]


def write_sound(path, codec="pcm_s16le"):
    """A file with a quarter of a second of sound and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2000), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0:open-gop=0"}
OPEN_GOP = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"}


def uneven_times(count: int) -> list[int]:
    """Milliseconds with steps between 20 and 170: a variable frame rate."""
    return np.cumsum([0] + [20 + 50 * ((i * 7) % 4) for i in range(count - 1)]).tolist()


CONTAINERS = {
    "mp4": {"suffix": "mp4", "options": {"bf": "0"}},
    "mp4 with B-frames": {"suffix": "mp4", "options": B_FRAMES},
    "mp4 with open GOP": {"suffix": "mp4", "options": OPEN_GOP},
    "mp4 of 10-bit HEVC": {
        "suffix": "mp4",
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "options": {"x265-params": "log-level=none:pools=none:frame-threads=1:keyint=12:bframes=3"},
    },
    "fragmented mp4": {
        "suffix": "mp4",
        "options": B_FRAMES,
        "container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    },
    "mp4 with variable frame rate": {"suffix": "mp4", "options": B_FRAMES, "times": uneven_times},
    "mp4 with variable frame rate, no B-frames": {"suffix": "mp4", "options": {"bf": "0"}, "times": uneven_times},
    "mkv": {"suffix": "mkv", "options": OPEN_GOP},
    "mkv with variable frame rate": {"suffix": "mkv", "options": B_FRAMES, "times": uneven_times},
    "mkv without durations": {"suffix": "mkv", "options": B_FRAMES, "container_options": {"live": "1"}},
    "webm of VP9": {"suffix": "webm", "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "webm of VP8": {"suffix": "webm", "codec": "libvpx", "options": {"deadline": "realtime", "b": "500k"}},
    "ts": {"suffix": "ts", "options": OPEN_GOP},
    "ts of MPEG-2": {"suffix": "ts", "codec": "mpeg2video", "options": {"bf": "2", "b": "2M"}},
    "avi of MPEG-4": {"suffix": "avi", "codec": "mpeg4", "options": {"b": "1M"}},
    "avi with B-frames": {"suffix": "avi", "codec": "mpeg4", "options": {"b": "1M", "bf": "2"}},
    "avi of H.264 with B-frames": {"suffix": "avi", "options": B_FRAMES},
    "gif": {"suffix": "gif", "codec": "gif", "pix_fmt": "rgb8"},
    "raw h264": {"suffix": "h264", "options": B_FRAMES},
}


def write_container(path_stem, kind: str, count: int = 150) -> str:
    """Write one of `CONTAINERS`."""
    recipe = dict(CONTAINERS[kind])
    suffix, times = recipe.pop("suffix"), recipe.pop("times", None)
    return write_video(f"{path_stem}.{suffix}", count, times=times(count) if times else None, **recipe)


def count_decoded(monkeypatch) -> list:
    """A list that grows by one with each frame that is decoded from now on."""
    decoded, original = [], video_reader.PyAVReader._next

    def counting(reader):
        decoded.append(None)
        return original(reader)

    monkeypatch.setattr(video_reader.PyAVReader, "_next", counting)
    return decoded
