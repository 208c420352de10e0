"""What goes wrong with a video."""


class VideoDecodeError(ValueError):
    """A video cannot be read. The message is one line: the name of the video, then the reason."""


class VideoDecodeWarning(UserWarning):
    """Part of a video cannot be read; the message says how much."""


def printable(name: str) -> str:
    """Without what a terminal would act on, and without half characters that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def short(name: str, limit: int = 200) -> str:
    """On one line, and not too long to read."""
    name = printable(" ".join(name.split()))
    return name if len(name) <= limit else name[: limit - 3] + "..."


def one_line(error: BaseException) -> str:
    return short(str(error) or type(error).__name__)
