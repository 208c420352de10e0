"""Plain numbers: what NumPy, torch and JSON make of 8 (`np.int64(8)`, `8.0`) is 8, and what is no number is refused.

Otherwise a configuration with `np.int64(8)` cannot be saved, a beam search with `2.0` beams ends in a TypeError, and
`max_new_tokens=float("nan")` never ends.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

# Options of `generate()` -> their least value. What else transformers checks is left to it.
WHOLE_NUMBERS = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_assistant_tokens": 1,
    "prompt_lookup_num_tokens": 1,
    "max_matching_ngram_size": 1,
    "prefill_chunk_size": 1,
}
NUMBERS = {
    "temperature": 0,
    "top_p": 0,
    "top_h": 0,
    "min_p": 0,
    "typical_p": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "repetition_penalty": 0,
    "encoder_repetition_penalty": 0,
    "max_time": 0,
    "length_penalty": None,
    "guidance_scale": None,
}


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """
    `value` as an `int`.

    Raises:
        ValueError: it is not a whole number of at least `least`.
    """
    number = _plain(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{limit}, got {number!r:.80}")
    return number


def real_number(name: str, value: Any, least: float | None = None) -> float:
    """
    `value` as a finite `float`; an `int` stays one.

    Raises:
        ValueError: it is not a number of at least `least`.
    """
    number = _plain(value)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    if not is_number or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a number{limit}, got {number!r:.80}")
    return number


def plain_generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options of `generate()` with plain numbers, also those of a `generation_config` among them. `None` stays `None`.

    Raises:
        ValueError: a value that is no such number.
    """
    plain = dict(options)
    for name in plain.keys() & (WHOLE_NUMBERS.keys() | NUMBERS.keys()):
        if plain[name] is not None:
            plain[name] = _plain_option(name, plain[name])
    if plain.get("generation_config") is not None:
        plain["generation_config"] = plain_generation_config(plain["generation_config"])
    return plain


def plain_generation_config(config):
    """`config`, or a copy of it if numbers in it had to be changed; `None` stays `None`."""
    changed = {}
    for name in (*WHOLE_NUMBERS, *NUMBERS):
        value = getattr(config, name, None)
        if value is not None and (plain := _plain_option(name, value)) is not value:
            changed[name] = plain
    if changed:
        config = copy.deepcopy(config)
        for name, value in changed.items():
            setattr(config, name, value)
    return config


def _plain_option(name: str, value: Any) -> int | float:
    if name in WHOLE_NUMBERS:
        return whole_number(name, value, WHOLE_NUMBERS[name])
    number = float(real_number(name, value, NUMBERS[name]))  # some options must not be an int
    return value if type(value) is float else number


def _plain(value: Any) -> Any:
    """A single value without NumPy's or torch's type."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
