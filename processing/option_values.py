"""Options as plain numbers: what NumPy, torch and JSON make of 8 (`np.int64(8)`, `8.0`) is 8, and what is no number is
refused by name. Without this, strict type checks refuse the former, and let NaN and True through."""

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

# Option -> its least value.
WHOLE_NUMBERS = {"num_frames": 1, "max_frames": 1, "shortest_edge": 1, "video_stream": 0}
NUMBERS_ABOVE_0 = ("fps", "video_end")
NUMBERS_FROM_0 = ("video_start",)
NUMBERS = ("rescale_factor",)


def whole_number(name: str, value: Any, least: int) -> int:
    """
    `value` as an `int`.

    Raises:
        ValueError: it is not a whole number of at least `least`; the message names the argument.
    """
    number = _plain(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"`{name}` is {_shown(number)}; it must be a whole number of at least {least}")
    return number


def real_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float | int:
    """
    `value` as a finite `float` or `int`.

    Raises:
        ValueError: it is no such number of at least `least` or above `above`; the message names the argument.
    """
    number = _plain(value)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    if not is_number or (least is not None and number < least) or (above is not None and number <= above):
        limit = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
        raise ValueError(f"`{name}` is {_shown(number)}; it must be a number{limit}")
    return number


def plain_video_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options of the video processor with their numbers as plain ones. `None` stays `None`.

    Raises:
        ValueError: a value that is no such number.
    """
    plain = dict(options)
    for name, value in plain.items():
        if value is None:
            continue
        if name in WHOLE_NUMBERS:
            plain[name] = whole_number(name, value, WHOLE_NUMBERS[name])
        elif name in NUMBERS_ABOVE_0:
            plain[name] = real_number(name, value, above=0)
        elif name in NUMBERS_FROM_0:
            plain[name] = real_number(name, value, least=0)
        elif name in NUMBERS:
            plain[name] = real_number(name, value)
        elif name in ("size", "crop_size"):
            plain[name] = _plain_size(name, value)
        elif name in ("image_mean", "image_std"):
            plain[name] = _plain_channels(name, value)
    start, end = plain.get("video_start"), plain.get("video_end")
    if start is not None and end is not None and start >= end:
        raise ValueError(f"`video_start` {start:g} must be before `video_end` {end:g} (both in seconds)")
    return plain


def _plain_size(name: str, size: Any) -> Any:
    if isinstance(size, Mapping):
        return {edge: None if value is None else whole_number(name, value, 1) for edge, value in size.items()}
    if isinstance(size, (list, tuple)):
        return type(size)(whole_number(name, value, 1) for value in size)
    return whole_number(name, size, 1) if isinstance(_plain(size), (int, float)) else size


def _plain_channels(name: str, value: Any) -> float | list[float]:
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [real_number(name, channel) for channel in value]
    return real_number(name, value)


def _plain(value: Any) -> Any:
    """A single value without NumPy's or torch's type. PyAV's frame rates are fractions."""
    if isinstance(value, (Fraction, Decimal)):
        return float(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
