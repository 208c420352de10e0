"""From videos to `pixel_values_videos`: which frames are taken, and how each is resized for the encoder.

`size` is always the output size, `{"height", "width"}` (servers size their profiling videos by it). `do_center_crop`
says how a frame gets there: True keeps its aspect ratio (resized until it covers `size`, then the centre is cropped:
CLIP), False squashes it (SigLIP; the original LongVLM, with nearest interpolation). Videos given as files are decoded
by `video_decoding`: only the frames that are needed, each resized as soon as it is decoded.
Frames are sampled as in the released code, at the middles of equal ranges of the video (paper section 4.1: 100).
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .crop_spans import middle_span
from .option_values import plain_video_options, real_number, whole_number
from .pictures import picture_size, picture_to_rgb, read_picture
from .time_windows import frames_in_window, part_of_video
from .video_decoders import describe_decoder, is_video_decoder, iter_decoder
from .video_decoding import DecodedVideo, FrameMetadata, decode_video, iter_video, probe_video
from .video_sources import VideoSource, encoded_video, open_source

PRESETS = {
    "clip": {"do_center_crop": True, "resample": PILImageResampling.BICUBIC},
    "original": {"do_center_crop": False, "resample": PILImageResampling.NEAREST},
}
# Options that image processors have as well, under the same names.
IMAGE_OPTIONS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
SHORT_VIDEO = ("keep", "stretch", "once")
SAMPLING = ("max_frames", "short_video", "video_start", "video_end")  # next to num_frames and fps
MAX_UNSAMPLED_FRAMES = 10_000  # about 1.5 GB of 224 x 224 frames, four times that as floats
MAX_COVERING = 4  # times the output's area; larger frames are cropped before they are resized
METADATA_FIELDS = ("total_num_frames", "fps", "width", "height", "duration", "video_backend", "frames_indices")


class LongVLMVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    """`VideosKwargs` with our own options; see `LongVLMVideoProcessor`."""

    max_frames: int | None
    short_video: str | None
    video_start: float | int | None
    video_end: float | int | None
    video_stream: int | None
    shortest_edge: int | None
    decoding_backend: str | None


@contextmanager
def auto_map_in_files_only(*objects):
    """Saving adds an `auto_map` to the objects, which this removes: they stay equal to what they were."""
    try:
        yield
    finally:
        for one in objects:
            vars(one).pop("auto_map", None)


class VideoPiece(NamedTuple):
    """
    Consecutive frames of a video that were read together.

    Args:
        pixel_values (`torch.Tensor` of shape `(frames, 3, H, W)`): float32, ready for the vision encoder.
        timestamps (`list[float]`, *optional*): the time of each frame in seconds, where it is known.
        duration (`float`, *optional*): length of the whole video in seconds, where it is known.
    """

    pixel_values: torch.Tensor
    timestamps: list[float] | None
    duration: float | None


class LongVLMVideoProcessor(BaseVideoProcessor):
    r"""
    Samples frames from videos and prepares them for the vision encoder.

    Args:
        preset (`str`, *optional*, defaults to `"clip"`):
            `"clip"`: bicubic resize of the shorter edge and centre crop, as CLIP was trained. `"original"`: squashed
            with nearest interpolation, as the released LongVLM code does before CLIP's own processor. A preset
            only sets `do_center_crop` and `resample`, which can also be given directly; it is not saved.
        num_frames (`int`, defaults to 100):
            Number of frames taken from a video. For shorter videos, see `short_video`.
        fps (`float`, *optional*):
            Take this many frames per second instead, at the middle of each interval of 1 / fps seconds. No frame is
            taken twice. If set on the processor, it takes precedence over `num_frames`.
        max_frames (`int`, *optional*):
            Maximum number of frames with `fps`: a longer video is sampled more coarsely, over its whole length.
        short_video (`str`, defaults to `"keep"`):
            What to take from a video with fewer than `num_frames` frames. `"keep"`: as many frames as there are, by
            the released rule, which takes a middle frame twice and the last one never; `"stretch"`: those frames
            stretched to `num_frames` by nearest interpolation along time, as the original intended; `"once"`: every
            frame once.
        video_start, video_end (`float`, *optional*):
            Take frames from this part of the video only, as if it were the whole: those with `video_start` <= time <
            `video_end`, in seconds from the first frame. Nothing else is decoded.
        video_stream (`int`, *optional*):
            Number of the video stream in its file, if the file has several; default: see `decode_video`.
        size (`dict`, defaults to `{"height": 224, "width": 224}`):
            Size of the output frames. Files written for CLIP or DINOv2 (`size={"shortest_edge": 256}` with
            `crop_size`) are understood: `size` becomes their `crop_size`, and `shortest_edge` 256.
        do_center_crop (`bool`): keep the aspect ratio and crop (True), or squash (False).
        shortest_edge (`int`, *optional*):
            With `do_center_crop`: length of the shorter edge before the crop. `None`: frames just cover `size`.
        resample, do_resize, do_rescale, rescale_factor, do_normalize, image_mean, image_std:
            As in other transformers processors. Defaults: CLIP's mean and standard deviation.
        do_sample_frames (`bool`, defaults to `True`):
            False: all given frames are used; `video_metadata` then says where they come from.
        decoding_backend (`str`, *optional*): `"torchcodec"`, `"pyav"` or `"auto"`; see `decode_video`.
    """

    model_input_names = ["pixel_values_videos", "num_frames"]  # noqa: RUF012 (transformers' way)
    valid_kwargs = LongVLMVideoProcessorKwargs

    size = {"height": 224, "width": 224}  # noqa: RUF012
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 100
    fps = None
    max_frames = None
    short_video = "keep"
    video_start = None
    video_end = None
    video_stream = None
    shortest_edge = None
    decoding_backend = None

    def __init__(self, *, preset: str | None = None, **kwargs):
        if preset is not None and preset not in PRESETS:
            raise ValueError(f'preset "{preset}" is not known; choose one of {", ".join(PRESETS)}')
        kwargs = plain_video_options(kwargs)
        super().__init__(**{**(PRESETS[preset] if preset else {}), **_size_as_output(kwargs)})
        self._check_short_video(self.short_video)

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs):
        """As in the base class; `preset=`, `size=` and `crop_size=` override what was saved."""
        preset = kwargs.pop("preset", None)
        if preset is not None:
            kept = {key: value for key, value in video_processor_dict.items() if key not in PRESETS["clip"]}
            video_processor_dict = {**kept, "preset": preset}
        replaced = {"auto_map"}  # is for files alone
        if _is_output_size(kwargs.get("size")):
            replaced.add("crop_size")
        elif kwargs.get("crop_size") is not None and _is_output_size(video_processor_dict.get("size")):
            replaced.add("size")
        kept = {key: value for key, value in video_processor_dict.items() if key not in replaced}
        return super().from_dict(kept, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As in the base class."""
        with auto_map_in_files_only(self):
            return super().save_pretrained(save_directory, **kwargs)

    # --- which frames ---

    def sample_frames(self, metadata, num_frames: int | None = None, fps: float | None = None, **kwargs) -> np.ndarray:
        """
        Chooses the frames of a video.

        Args:
            metadata: `VideoMetadata` or dict with `total_num_frames`; sampling by `fps` also needs the video's own
                frame rate in it.
            num_frames, fps: at most one of them; default: the processor's.
            kwargs: `max_frames`, `short_video`, `video_start` and `video_end`; others are ignored.
        Returns:
            Source indices, ascending, int64. For videos with fewer frames than asked for, see `short_video`.
        """
        given = {name: kwargs[name] for name in SAMPLING if name in kwargs}
        given = plain_video_options({"num_frames": num_frames, "fps": fps, **given})
        num_frames, fps = given["num_frames"], given["fps"]
        if num_frames is not None and fps is not None:
            raise ValueError(f"`num_frames` {num_frames} and `fps` {fps} exclude each other; give one of them")
        if num_frames is None and fps is None:
            fps = self.fps
        if isinstance(metadata, dict):
            metadata = FrameMetadata(**{name: value for name, value in metadata.items() if name in METADATA_FIELDS})
        if not metadata.total_num_frames:
            raise ValueError("the video has no frames")
        rule = {name: getattr(self, name) if given.get(name) is None else given[name] for name in SAMPLING}
        window = frames_in_window(metadata, rule["video_start"], rule["video_end"])
        part = part_of_video(metadata, window)
        if fps is not None:
            indices = self._indices_by_time(part, fps, rule["max_frames"])
        else:
            count = self.num_frames if num_frames is None else num_frames
            indices = self._indices_by_count(len(window), count, rule["short_video"])
        return indices + window.start

    def _indices_by_count(self, total: int, count: int, short_video: str) -> np.ndarray:
        self._check_short_video(short_video)
        if total < count and short_video == "once":
            return np.arange(total)
        indices = _middles(total, min(total, count))
        if total < count and short_video == "stretch":
            # torch's nearest interpolation: the scale in float32, as in the released code
            positions = np.arange(count, dtype=np.float32) * np.float32(total / count)
            indices = indices[np.minimum(positions.astype(np.int64), total - 1)]
        return indices

    @staticmethod
    def _indices_by_time(metadata, fps: float, max_frames: int | None) -> np.ndarray:
        total, times = metadata.total_num_frames, getattr(metadata, "source_timestamps", None)
        if times is None and not metadata.fps:
            raise ValueError(
                f"fps={fps} samples by time, but the frame rate of the video is unknown; "
                'pass video_metadata={"total_num_frames": ..., "fps": ...} or use num_frames'
            )
        times = np.asarray(times, dtype=np.float64) if times is not None else np.arange(total) / metadata.fps
        start, duration = times[0], times[-1] - times[0] + 1 / (metadata.fps or fps)
        count = max(1, round(duration * fps))
        step = 1 / fps
        if max_frames is not None and count > max_frames:
            count, step = max_frames, duration / max_frames
        wanted = start + (np.arange(count) + 0.5) * step
        # The frame on screen at that moment, or 1e-6 s later: rounding must not choose the one before.
        return np.unique(np.clip(np.searchsorted(times, wanted + 1e-6, side="right") - 1, 0, total - 1))

    @staticmethod
    def _check_short_video(value: str) -> str:
        if value not in SHORT_VIDEO:
            raise ValueError(f'short_video="{value}" is not known; choose one of {", ".join(SHORT_VIDEO)}')
        return value

    # --- from videos to tensors ---

    def preprocess(self, videos, *, video_options=None, progress=None, **kwargs) -> BatchFeature:
        """
        Args:
            videos: one video or a (nested) list of them. A video is a path, a URL, bytes, a file object, a folder
                of images, a row of a `datasets` Video column (decoded or not), torchcodec's `VideoDecoder`, a list of
                frames (Pillow, NumPy, torch; any size; grey or RGBA, whose alpha is dropped), or an array
                `(T, H, W, C)`, `(T, C, H, W)` or, grey, `(T, H, W)`. A 5D array is a batch. Pixel values are 0 to 255;
                floats that are all within 0 to 1 count as already rescaled.
            video_options: options of single videos, which replace those in `kwargs`: one dict (or `None`) per video.
            progress: called as `progress("decode", done, total)` with the frames read of the current video.
            video_metadata: for videos given as frames: the `fps` and `total_num_frames` of the source, and in
                `frames_indices` the positions of the given frames in it. For a folder of images: its `fps`. A dict or
                `VideoMetadata`, or a list of them.
            kwargs: options of the processor; `num_frames` and `fps` exclude each other.
        Returns:
            `BatchFeature` with `pixel_values_videos` float32 `(videos, max_frames, 3, H, W)`, where shorter videos are
            padded with zeros; `num_frames` int64 `(videos,)`; and with `return_metadata=True` also `video_metadata`,
            one `FrameMetadata` per video: source indices, source frame rate, `timestamps` in seconds.
        Raises:
            VideoDecodeError: a video cannot be read; the message is one line that names it.
            ValueError: options or arrays that do not fit.
        """
        kwargs.pop("load_audio_from_video", None)  # servers set it for every processor; we have no use for sound
        metadata = kwargs.pop("video_metadata", None)
        return_tensors = kwargs.pop("return_tensors", None)
        options = self._options(kwargs)
        sources = flatten_videos(videos)
        metadata = _match_metadata(metadata, len(sources))
        if video_options is None:
            video_options = [None] * len(sources)
        if len(video_options) != len(sources):
            raise ValueError(f"{len(sources)} videos, but video_options has {len(video_options)} entries")
        decoded, options_used = [], []
        for source, described, own in zip(sources, metadata, video_options, strict=True):
            own = dict(own or {})
            described = own.pop("video_metadata", described)
            options_used.append(self._options(_replace_options(kwargs, own)) if own else options)
            (video,) = self._load(source, described, options_used[-1], progress)
            decoded.append(video)

        counts = torch.tensor([len(video.frames) for video in decoded])
        pixels = self._stack(decoded, int(counts.max()), options_used)
        features = BatchFeature({"pixel_values_videos": pixels, "num_frames": counts}, tensor_type=return_tensors)
        if options["return_metadata"]:
            features["video_metadata"] = [video.metadata for video in decoded]
        return features

    def iter_pixel_values(self, video, **kwargs) -> Iterator[torch.Tensor]:
        """Yields the `pixel_values` of `iter_pieces`: float32 `(frames, 3, H, W)`."""
        for piece in self.iter_pieces(video, **kwargs):
            yield piece.pixel_values

    def iter_pieces(self, video, *, frames_per_piece: int = 128, progress=None, **kwargs) -> Iterator[VideoPiece]:
        """
        Yields one video piece by piece, so that memory does not grow with its length. Together the pieces are what
        `preprocess` returns.

        Args:
            video: as in `preprocess`.
            frames_per_piece: maximum number of frames per piece.
            progress, kwargs: as in `preprocess`.
        Yields:
            `VideoPiece`.
        Raises:
            VideoDecodeError: the video cannot be read.
        """
        frames_per_piece = whole_number("frames_per_piece", frames_per_piece, 1)
        metadata = kwargs.pop("video_metadata", None)
        options = self._options(kwargs)
        sources = flatten_videos([video])
        (metadata,) = _match_metadata(metadata, len(sources))
        for piece in self._load(sources[0], metadata, options, progress, frames_per_piece):
            pixel_values = self._stack([piece], len(piece.frames), [options])[0]
            yield VideoPiece(pixel_values, piece.metadata.timestamps, piece.metadata.duration)

    def check_options(self, **kwargs) -> None:
        """
        Raises:
            ValueError: options that no video can have, or that do not fit together.
        """
        kwargs.pop("video_metadata", None)
        self._options(kwargs)

    def count_frames(self, video, *, video_options: Mapping | None = None, **kwargs) -> int:
        """
        Number of frames that `preprocess` takes from a video, without decoding it. A damaged video may have fewer.

        Args:
            video: one video, as in `preprocess`.
            video_options: options of this video, which replace those in `kwargs`.
            kwargs: as in `preprocess`.
        Raises:
            VideoDecodeError: the video cannot be opened.
            ValueError: options that do not fit.
        """
        kwargs = _replace_options(kwargs, dict(video_options or {}))
        described = kwargs.pop("video_metadata", None)
        options = self._options(kwargs)
        video = encoded_video(video)
        if is_video_decoder(video):
            return len(self._choose_from_source(describe_decoder(video), described, options))
        if _is_encoded(video):
            metadata = probe_video(video, **_stream_option(options))
            return len(self._choose_from_source(metadata, described, options))
        return len(self._choose_from_frames(video, described, options)[1])

    def encoded_video(self, video):
        """The file of a row of a `datasets` Video column; any other video unchanged."""
        return encoded_video(video)

    def open_video(self, video, **options) -> VideoSource:
        """
        Opens a video that is not given as frames; one at a URL is downloaded. The result can be used wherever a video
        can, any number of times, until it is closed (it is a context manager).

        Args:
            video: as in `preprocess`.
            options: limits of a download, what a name may lead to, progress; see `open_source`.
        Raises:
            VideoDecodeError: there is no such video.
        """
        return open_source(video, **options)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """Decode one video or a list of them: `(uint8 (T, 3, H, W), FrameMetadata)`, or a list of each."""
        if isinstance(video_url_or_urls, (list, tuple)):
            videos = [self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls]
            return list(zip(*videos, strict=True))
        choose = sample_indices_fn or _all_frames
        stream = _stream_option({"video_stream": self.video_stream})
        decoded = decode_video(
            video_url_or_urls, choose, transform=_channels_first, backend=self.decoding_backend, **stream
        )
        return torch.stack(decoded.frames), decoded.metadata

    def _options(self, kwargs: dict) -> dict:
        """Options of the call, else those of the processor."""
        known = self.valid_kwargs.__annotations__
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"`{name}` is not an option of the video processor{hint}")
        kwargs = _size_as_output(plain_video_options(kwargs))
        try:
            validate_typed_dict(self.valid_kwargs, kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from None
        options = {name: getattr(self, name, None) for name in known}
        options |= {name: value for name, value in kwargs.items() if value is not None or name not in SAMPLING}
        # Only those of the call: the processor's own `num_frames` does not conflict with the `fps` of a call.
        options["num_frames"], options["fps"] = kwargs.get("num_frames"), kwargs.get("fps")
        if options["num_frames"] is not None and options["fps"] is not None:
            raise ValueError(
                f"`num_frames` {options['num_frames']} and `fps` {options['fps']} exclude each other; give one of them"
            )
        by_time = options["fps"] is not None or (options["num_frames"] is None and self.fps is not None)
        if kwargs.get("max_frames") is not None and options["do_sample_frames"] and not by_time:
            raise ValueError(
                f"`max_frames` {kwargs['max_frames']} needs `fps`; to choose the number of frames, give `num_frames`"
            )
        return self._standardize_kwargs(**options)

    def _load(
        self, video, described: Mapping | None, options: dict, progress, frames_per_piece: int | None = None
    ) -> Iterator[DecodedVideo]:
        """Yields frames uint8 or float32 `(3, H, W)`, already resized; all in one piece by default."""
        video = encoded_video(video)
        if is_video_decoder(video):
            yield from iter_decoder(
                video,
                lambda metadata: self._choose_from_source(metadata, described, options),
                frames_per_piece=frames_per_piece,
                transform=lambda frame: self._resize_frame(frame, options),
                progress=progress,
            )
            return
        if _is_encoded(video):
            yield from iter_video(
                video,
                lambda metadata: self._choose_from_source(metadata, described, options),
                frames_per_piece=frames_per_piece,
                transform=lambda frame: self._resize_frame(_channels_first(frame), options),
                backend=options["decoding_backend"],
                progress=progress,
                **_stream_option(options),
            )
            return
        frames, positions, source = self._choose_from_frames(video, described, options)
        if source.frames_indices is not None:
            source.frames_indices = [int(source.frames_indices[i]) for i in positions]
        scale = 255.0 if options["do_rescale"] and _are_unit_floats(frames) else None
        size = frames_per_piece or max(len(positions), 1)
        for start in range(0, max(len(positions), 1), size):
            piece = copy.copy(source)
            taken = positions[start : start + size]
            if source.frames_indices is not None:
                piece.frames_indices = source.frames_indices[start : start + size]
            resized = {
                i: self._resize_frame(_to_rgb(frames[i], options["input_data_format"], scale), options)
                for i in set(taken)
            }
            if progress is not None:
                progress("decode", start + len(taken), len(positions))
            yield DecodedVideo([resized[i] for i in taken], piece)

    def _choose(self, metadata, options: dict) -> np.ndarray:
        """The rule of the options applied to a whole video."""
        if options["do_sample_frames"]:
            return self.sample_frames(metadata, **{name: options[name] for name in ("num_frames", "fps", *SAMPLING)})
        limit = options["max_frames"] or MAX_UNSAMPLED_FRAMES
        return _all_frames(metadata, limit, options["video_start"], options["video_end"])

    def _choose_from_source(self, metadata, described: Mapping | None, options: dict) -> np.ndarray:
        """`described`: the caller's `video_metadata`. A folder of images has no frame rate of its own."""
        if not metadata.fps and described is not None and described.get("fps"):
            metadata.fps = real_number("fps", described["fps"], above=0)
        return self._choose(metadata, options)

    def _choose_from_frames(self, video, described: Mapping | None, options: dict):
        """-> the given frames, the positions of those to take, and metadata of the source they come from."""
        if options["video_stream"] is not None:
            raise ValueError(f"`video_stream` {options['video_stream']} is for files; this video is given as frames")
        frames = _as_frame_list(video, options["input_data_format"])
        given, source = _describe_frames(frames, described)
        window = options["video_start"], options["video_end"]
        if source.frames_indices is None and window != (None, None):
            raise ValueError(
                f"{len(frames)} of {source.total_num_frames} frames are given, so their times are unknown; "
                'pass their positions as "frames_indices" in video_metadata, or no `video_start` and `video_end`'
            )
        if options["do_sample_frames"]:
            return frames, self._choose(given, options), source
        return frames, frames_in_window(given, *window), source

    def _resize_frame(self, frame: torch.Tensor, options: dict) -> torch.Tensor:
        """`(3, h, w)` -> `(3, H, W)`."""
        if options["device"] is not None:
            frame = frame.to(options["device"])
        size, resample = options["size"], options["resample"]
        if resample == PILImageResampling.NEAREST:
            # torch's "nearest", as in the released code; transformers would take "nearest-exact", half a pixel away
            resample = InterpolationMode.NEAREST
        if not options["do_center_crop"]:
            fits = frame.shape[-2:] == (size.height, size.width)
            return self.resize(frame, size, resample) if options["do_resize"] and not fits else frame
        if options["do_resize"]:
            height, width = frame.shape[-2:]
            if options["shortest_edge"] is not None:
                scale = options["shortest_edge"], min(height, width)
            elif size.height * width >= size.width * height:
                scale = size.height, height
            else:
                scale = size.width, width
            # In integers and rounded down, as CLIP's processor does.
            covering = [max(edge * scale[0] // scale[1], 1) for edge in (height, width)]
            if covering[0] * covering[1] > MAX_COVERING * size.height * size.width:
                frame = self._resize_middle(frame, covering, size, resample)
            elif covering != [height, width]:
                frame = self.resize(frame, SizeDict(height=covering[0], width=covering[1]), resample)
        # Contiguous: a view would keep the whole frame in memory.
        return self.center_crop(frame, size).contiguous()

    def _resize_middle(self, frame: torch.Tensor, covering: list[int], size: SizeDict, resample) -> torch.Tensor:
        """For very long or tall frames: resizes only the middle, as if the whole had been resized to `covering`."""
        spans = [
            middle_span(edge, whole, crop)
            for edge, whole, crop in zip(frame.shape[-2:], covering, (size.height, size.width), strict=True)
        ]
        rows, columns = (slice(span.start, span.stop) for span in spans)
        resized = SizeDict(height=spans[0].length, width=spans[1].length)
        frame = self.resize(frame[..., rows, columns].contiguous(), resized, resample)
        top, left = (span.offset for span in spans)
        return frame[..., top : top + min(size.height, covering[0]), left : left + min(size.width, covering[1])]

    def _stack(self, decoded: list[DecodedVideo], max_frames: int, options_used: list[dict]) -> torch.Tensor:
        """Rescale, normalise and pad, each video with its options: float32 `(videos, max_frames, 3, H, W)`."""
        shapes = {tuple(frame.shape) for video in decoded for frame in video.frames}
        if len(shapes) > 1:
            raise ValueError(
                f"frames of different sizes, {sorted(shapes)[:3]}, need do_resize=True or do_center_crop=True"
            )
        device = decoded[0].frames[0].device
        pixels = torch.zeros(len(decoded), max_frames, *shapes.pop(), dtype=torch.float32, device=device)
        for row, (video, options) in enumerate(zip(decoded, options_used, strict=True)):
            # in pieces, so that no second float copy of the whole video exists
            for start in range(0, len(video.frames), 32):
                frames = torch.stack([frame.to(torch.float32) for frame in video.frames[start : start + 32]])
                pixels[row, start : start + len(frames)] = self.rescale_and_normalize(
                    frames,
                    options["do_rescale"],
                    options["rescale_factor"],
                    options["do_normalize"],
                    options["image_mean"],
                    options["image_std"],
                )
        return pixels


def _stream_option(options: Mapping) -> dict[str, int]:
    stream = options["video_stream"]
    return {} if stream is None else {"video_stream": stream}


def _all_frames(
    metadata,
    limit: int = MAX_UNSAMPLED_FRAMES,
    video_start: float | None = None,
    video_end: float | None = None,
) -> np.ndarray:
    """Every index, of a window or of the whole; refuses videos whose frames would fill the memory."""
    window = frames_in_window(metadata, video_start, video_end)
    if len(window) > limit:
        raise ValueError(
            f"the video has {len(window)} frames, more than {limit}, and without sampling "
            "all of them are kept; pass num_frames or fps with do_sample_frames=True, or a larger max_frames"
        )
    return np.array(window)


def _middles(total: int, count: int) -> np.ndarray:
    """The middles of `count` equal ranges of frames 0 to `total` - 1 (released code; rounds half to even)."""
    edges = np.round((total - 1) / count * np.arange(count + 1)).astype(np.int64)
    return (edges[:-1] + edges[1:]) // 2


def _replace_options(kwargs: dict, own: dict) -> dict:
    """`kwargs` overridden by `own`; a frame count also replaces a frame rate with its maximum, and vice versa."""
    if "num_frames" in own:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("fps", "max_frames")}
    elif "fps" in own:
        kwargs = {name: value for name, value in kwargs.items() if name != "num_frames"}
    return {**kwargs, **own}


def _size_as_output(kwargs: dict) -> dict:
    """Turns the sizes of CLIP and DINOv2 files into ours, where `size` is the output size."""
    kwargs = dict(kwargs)
    size, crop_size = kwargs.get("size"), kwargs.pop("crop_size", None)
    if isinstance(size, int) and crop_size is not None:
        size = {"shortest_edge": size}  # CLIP's shorthand
    if crop_size is not None:
        crop_size = {"height": crop_size, "width": crop_size} if isinstance(crop_size, int) else dict(crop_size)
        crop_size = {"height": crop_size["height"], "width": crop_size["width"]}
    if isinstance(size, Mapping) and size.get("shortest_edge"):
        edge = size["shortest_edge"]
        if size.get("longest_edge") or kwargs.get("do_center_crop") is False:
            raise ValueError(
                f'size={dict(size)} gives frames of different shapes; use {{"height": ..., "width": ...}}'
            )
        kwargs["size"] = crop_size or {"height": edge, "width": edge}
        covers = kwargs["size"]["height"] == kwargs["size"]["width"] == edge
        kwargs.update(do_center_crop=True, shortest_edge=None if covers else edge)
    elif crop_size is not None:
        kwargs["size"] = size or crop_size
        if isinstance(size, Mapping) and {k: v for k, v in dict(size).items() if v} != crop_size:
            raise ValueError(
                f"crop_size={crop_size} differs from size={dict(size)}; leave out crop_size: size is the output size"
            )
    return kwargs


def _is_output_size(size) -> bool:
    return isinstance(size, Mapping) and bool(size.get("height"))


# --- the many forms of a video ---


def flatten_videos(videos) -> list:
    """
    The videos of a (nested) list, in order.

    A list of frames (images, or arrays of 2 or 3 axes) is one video. A list of strings is a list of videos, but at
    the third level, where chat templates put them, it is one video, given as the paths of its frames.
    """
    if _is_array(videos) and videos.ndim == 5:
        return list(videos)
    if isinstance(videos, Sequence) and not isinstance(videos, (list, tuple, str, bytes, bytearray, memoryview)):
        videos = list(videos)  # a column of a data set
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if not videos:
        raise ValueError("the list of videos is empty")
    flat = []
    if all(_is_frame(video) for video in videos):
        return [videos]
    for video in videos:
        nested = isinstance(video, (list, tuple)) and bool(video)
        if nested and all(isinstance(part, (list, tuple)) and part and isinstance(part[0], str) for part in video):
            flat.extend(video)
        else:
            flat.extend(flatten_videos(video))
    return flat


def _is_array(value) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _is_frame(value) -> bool:
    return isinstance(value, Image.Image) or (_is_array(value) and value.ndim in (2, 3))


def _is_encoded(video) -> bool:
    return not isinstance(video, (list, tuple, Image.Image)) and not _is_array(video)


def _as_frame_list(video, data_format=None) -> list:
    """The frames of a video that is given as frames."""
    if isinstance(video, (list, tuple)):
        frames = list(video)  # paths are read when they are chosen
        if not frames or not all(isinstance(frame, str) or _is_frame(frame) for frame in frames):
            raise ValueError("a video given as a list needs images or arrays of 2 or 3 axes, at least one")
        return frames
    if isinstance(video, Image.Image):
        return [video]
    if video.ndim == 2 or (video.ndim == 3 and (data_format or _channel_axis(video) is not None)):
        return [video]
    if video.ndim not in (3, 4) or 0 in video.shape:
        raise ValueError(f"a video of shape {tuple(video.shape)} is not (T, H, W, C), (T, C, H, W) or (T, H, W)")
    return list(video)


def _channel_axis(frame) -> int | None:
    """0 or -1: where 1, 3 or 4 channels stand. Last wins, as in transformers' loaders."""
    for axis in (-1, 0):
        if frame.shape[axis] in (1, 3, 4):
            return axis
    return None


def _are_unit_floats(frames: list) -> bool:
    """Whether all frames are floats within 0 to 1."""
    if not all(_is_array(frame) for frame in frames):
        return False
    kinds = (torch.as_tensor(frame) for frame in frames)
    return all(t.is_floating_point() and bool(t.min() >= 0) and bool(t.max() <= 1) for t in kinds)


def _to_rgb(frame, data_format=None, scale: float | None = None) -> torch.Tensor:
    """A frame as `(3, H, W)`, uint8 or float32; alpha is dropped, grey repeated."""
    if isinstance(frame, str):
        return _channels_first(read_picture(frame))
    if isinstance(frame, Image.Image):
        return _channels_first(picture_to_rgb(frame))
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint16:
        frame = (frame >> 8).astype(np.uint8)
    frame = torch.as_tensor(np.ascontiguousarray(frame) if isinstance(frame, np.ndarray) else frame)
    if frame.ndim == 2:
        frame = frame[None]
    else:
        axis = {"channels_first": 0, "channels_last": -1}.get(str(getattr(data_format, "value", data_format)))
        axis = _channel_axis(frame) if axis is None else axis
        if axis is None:
            raise ValueError(f"a frame of shape {tuple(frame.shape)} has no axis of 1, 3 or 4 channels")
        frame = frame.movedim(axis, 0)
    frame = frame.expand(3, -1, -1) if frame.shape[0] == 1 else frame[:3]
    if frame.dtype == torch.bool:
        return frame.to(torch.uint8) * 255
    if frame.is_floating_point():
        return frame.to(torch.float32) * scale if scale else frame.to(torch.float32)
    if frame.dtype != torch.uint8 and not 0 <= int(frame.min()) <= int(frame.max()) <= 255:
        raise ValueError(f"pixel values from {int(frame.min())} to {int(frame.max())} are outside 0 to 255")
    return frame.to(torch.uint8)


def _channels_first(frame) -> torch.Tensor:
    """`(H, W, 3)` or already `(3, H, W)` -> `(3, H, W)`, contiguous."""
    if isinstance(frame, torch.Tensor):
        return frame
    return torch.from_numpy(frame).permute(2, 0, 1).contiguous()


# --- metadata of videos that are given as frames ---


def _match_metadata(metadata, videos: int) -> list:
    """One entry per video."""
    if metadata is None:
        return [None] * videos
    flat = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    while flat and isinstance(flat[0], (list, tuple)):
        flat = [entry for entries in flat for entry in entries]
    if len(flat) != videos:
        raise ValueError(f"{videos} videos but {len(flat)} entries of video_metadata were given; pass one per video")
    return flat


def _describe_frames(frames: list, metadata: Mapping | None) -> tuple[FrameMetadata, FrameMetadata]:
    """Returns metadata of the given frames, as if they were a whole video, and of the source that they come from.

    The source's `frames_indices` are those of the given frames, or `None` if they are unknown.
    """
    known = {key: metadata[key] for key in METADATA_FIELDS if key in metadata} if metadata is not None else {}
    first = frames[0]
    height, width = picture_size(first) if isinstance(first, str) else _to_rgb(first).shape[1:]
    defaults = {"total_num_frames": len(frames), "height": height, "width": width}
    source = FrameMetadata(**defaults | {key: value for key, value in known.items() if value is not None})
    source.source_timestamps = getattr(metadata, "source_timestamps", None)
    if source.frames_indices is None and source.total_num_frames == len(frames):
        source.frames_indices = range(len(frames))
    if source.frames_indices is not None and len(source.frames_indices) != len(frames):
        raise ValueError(f"frames_indices names {len(source.frames_indices)} frames, but {len(frames)} were given")
    given = FrameMetadata(len(frames), fps=source.fps, duration=source.duration)
    if source.timestamps is not None:
        given.source_timestamps = np.array(source.timestamps)
        given.start_time = 0.0 if source.source_timestamps is None else float(source.source_timestamps[0])
    return given, source


LongVLMVideoProcessor.register_for_auto_class("AutoVideoProcessor")
