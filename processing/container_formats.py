"""Opening a video with FFmpeg so that it reads that video and nothing else.

Some of FFmpeg's formats are lists of other files or addresses (ffconcat, HLS, DASH, SDP, numbered pictures). FFmpeg
recognises them by their content, whatever the name: a stranger's upload could read files that are not the stranger's.
So only formats that read their own bytes are on, and of FFmpeg's protocols only the one for local files, or none where
the bytes come through Python.
"""

from .playlists import is_playlist
from .video_errors import VideoDecodeError
from .video_sources import VideoSource

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

# FFmpeg's names. Left out on purpose: concat, hls, dash, webm_dash_manifest, imf, image2 (name patterns), mlv (opens
# .M00, .M01...), vobsub, sdp, rtp, rtsp, sap, lavfi and other devices, tty and other text, svg_pipe.
FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpegtsraw", "mpeg", "mpegvideo", "flv", "live_flv", "kux", "asf", "asf_o"),
    *("ogg", "nut", "mxf", "gxf", "dv", "rm", "ivr", "wtv", "ivf", "swf", "nsv", "nuv", "pva", "ty", "dhav", "lxf"),
    *("viv", "vivo", "vividas", "dxa", "flic", "roq", "smk", "bink", "r3d", "cine", "ser", "usm", "xmv", "gif"),
    *("h261", "h263", "h264", "hevc", "vvc", "evc", "av1", "obu", "m4v", "mjpeg", "mpjpeg", "smjpeg", "mjpeg_2000"),
    *("vc1", "vc1test", "cavsvideo", "avs2", "avs3", "dirac", "dnxhd", "apv", "yuv4mpegpipe", "apng", "jpegxl_anim"),
    # single pictures
    *("png_pipe", "jpeg_pipe", "jpegls_pipe", "jpegxl_pipe", "j2k_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
    *("gif_pipe", "pam_pipe", "pbm_pipe", "pgm_pipe", "ppm_pipe", "pfm_pipe", "qoi_pipe", "dpx_pipe", "exr_pipe"),
    # sound, so that the error can say so
    *("mp3", "aac", "wav", "w64", "flac", "aiff", "au", "caf", "amr", "ac3", "eac3", "dts", "ape", "wv", "tta"),
)
# What the head of a file is, if it is a list of other files: its beginning, and its name.
_LISTS = (
    (b"ffconcat", "a list of other files (ffconcat)"),
    (b"#EXTM3U", "a playlist (HLS, M3U)"),
    (b"<MPD", "a playlist (DASH)"),
    (b"v=0", "a description of streams (SDP)"),
)
HEAD = 4096
MAX_PIXELS = 1 << 27  # of one frame: 16K, and half a gigabyte once it is decoded


def open_alone(source: VideoSource):
    """The source as a PyAV container.

    Raises:
        VideoDecodeError: not a video, or a list of other files.
    """
    opened = source.open()
    options = {
        "format_whitelist": ",".join(FORMATS),
        "protocol_whitelist": "file" if isinstance(opened, str) else "",
    }
    try:
        # Not `options=`: before PyAV 18 it crashes the process where streams are found late (FLV, MPEG).
        return av.open(opened, container_options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError):
        # FFmpeg's message contains the path and an error number; the reason is nearly always one of these.
        raise VideoDecodeError(f"{source.name}: {_what_it_is(source)}") from None


def check_decodable(source: VideoSource, stream) -> None:
    """
    Raises:
        VideoDecodeError: there is no decoder, or a frame is too large.
    """
    context = stream.codec_context
    if context is None:
        raise VideoDecodeError(f"{source.name}: FFmpeg has no decoder for its video stream, or cannot tell its codec")
    if context.width * context.height > MAX_PIXELS:
        raise VideoDecodeError(
            f"{source.name}: its frames of {context.width} x {context.height} pixels exceed the limit of "
            f"{MAX_PIXELS:,} pixels; scale the video down"
        )


def _what_it_is(source: VideoSource) -> str:
    head = source.head(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, name in _LISTS:
        if head.startswith(beginning) or (beginning.startswith(b"<") and beginning in head):
            remedy = ', or `allow` "playlist"' if is_playlist(head) else ""
            return f"not a video file but {name}; what it names is not opened: give the video itself{remedy}"
    if head and b"\0" not in head and head.isascii():
        return "not a video file but text"
    return "not a video file, or cut or damaged beyond reading"
