"""Reads the JSON files of checkpoints, which come from anywhere."""

import json
from pathlib import Path
from typing import Any


def read_json_object(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else, or is no JSON.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not UTF-8
        raise ValueError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} in JSON; an object, {{...}}, is wanted")
    return values
