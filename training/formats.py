"""Rows of training data, in any of the known forms, become chats: `[{"role", "content"}, ...]`.

Known forms: TRL's `messages`; LLaVA's `conversations` with `<video>` in the human's turns; VideoInstruct-100K's
`video_id, q, a`; `video, question, answer`. In a chat, a video is a part `{"type": "video", "video": ...}`: a mark
left in a string would be read as text, since the processor does not look for marks in what people wrote.
"""

import re
from collections.abc import Mapping
from typing import Any

VIDEO_MARK = "<video>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
VIDEO_KEYS = ("video", "videos", "video_id", "video_name", "video_path")
VIDEO_PART_KEYS = ("video", "path", "url")


class BadRow(ValueError):
    """A row that cannot be trained on: `kind` is what reports count, the message is the reason."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def as_messages(row: Any, number: int = 0) -> list[dict]:
    """
    The chat of a row.

    Args:
        row: a mapping in one of the known forms.
        number: the row's number in its file, from 0. VideoInstruct rows have the question before the video if it is
            even and after it otherwise, as in the released code.

    Returns:
        Messages. The content of a user's turn with videos is a list of parts, any other content a string. Video parts
        keep their options (`"num_frames": 50`), which the processor checks. Assistant turns before the first user turn
        are left out, as in the released code.

    Raises:
        BadRow: the row has no known form or no answer, or not as many videos as places for them.
    """
    if not isinstance(row, Mapping):
        raise BadRow("unknown form", f"a row must be a mapping, not {type(row).__name__}")
    given = _videos_of(row)
    if row.get("messages") is not None:
        messages = [_read_message(message, "role", "content") for message in _a_list(row["messages"], "messages")]
    elif row.get("conversations") is not None:
        turns = _a_list(row["conversations"], "conversations")
        messages = [_read_message(turn, "from", "value") for turn in turns]
    elif "q" in row and "a" in row:
        question = _text(row["q"], "q")
        marked = f"{question}\n{VIDEO_MARK}" if number % 2 == 0 else f"{VIDEO_MARK}\n{question}"
        messages = _two_turns(marked if given else question, _text(row["a"], "a"))
    elif "question" in row and "answer" in row:
        question = _text(row["question"], "question")
        messages = _two_turns(f"{VIDEO_MARK}\n{question}" if given else question, _text(row["answer"], "answer"))
    else:
        raise BadRow(
            "unknown form",
            f"it has neither messages, conversations, q + a nor question + answer, only {', '.join(map(str, row))}",
        )
    first = next((i for i, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    messages = _place_videos(messages[first:], given, marks_count="conversations" in row)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise BadRow("no answer", "the assistant says nothing")
    return messages


def videos_in(messages: list[dict]) -> list[Any]:
    """The videos of a chat in the order of their places; `None` for an empty place."""
    return [part.get("video") for part in _video_parts(messages)]


def without_videos(messages: list[dict]) -> list[dict]:
    """The chat with empty places, for a processor that gets pixels or features separately."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [{"type": "video"} if _is_video(p) else p for p in message["content"]]}
        for message in messages
    ]


def _video_parts(messages: list[dict]) -> list[dict]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if _is_video(part)
    ]


def _is_video(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "video"


def _two_turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _videos_of(row: Mapping) -> list[Any]:
    """Videos given next to the text of a row."""
    value = next((row[key] for key in VIDEO_KEYS if not _is_empty(row.get(key))), None)
    if value is None:
        return []
    # A list of pictures is one video only within a list of videos.
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_empty(value: Any) -> bool:
    """Not `in (None, "", [])`: an array cannot be compared with them."""
    return value is None or (isinstance(value, (str, list, tuple)) and not value)


def _a_list(value: Any, name: str) -> list:
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow("unknown form", f"{name} must be a list of turns, not {value!r:.60}")
    return list(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow("unknown form", f"{name} must be text, not {type(value).__name__}")
    return value


def _read_message(turn: Any, role_key: str, content_key: str) -> dict:
    if not isinstance(turn, Mapping) or role_key not in turn:
        raise BadRow("unknown form", f'a turn must have "{role_key}" and "{content_key}", not {turn!r:.60}')
    role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise BadRow("unknown role", f'"{role_key}" is {turn[role_key]!r}; use one of {", ".join(ROLES)}')
    content = turn.get(content_key)
    if content is None:
        content = ""
    if isinstance(content, (list, tuple)):
        parts = [_read_part(part) for part in content]
        if role != "user" or not any(map(_is_video, parts)):
            if any(map(_is_video, parts)):
                raise BadRow("misplaced video", f"a turn of the {role} has a video; only the user can show videos")
            return {"role": role, "content": "".join(part["text"] for part in parts)}
        return {"role": role, "content": parts}
    return {"role": role, "content": _text(content, content_key)}


def _read_part(part: Any) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), "text")}
    if kind == "video":
        value = next((part[key] for key in VIDEO_PART_KEYS if part.get(key) is not None), None)
        # Options of the video processor; tables have all keys in all rows, with None for those that a row lacks.
        options = {k: v for k, v in part.items() if k not in ("type", *VIDEO_PART_KEYS) and v is not None}
        return {"type": "video", **options} if value is None else {"type": "video", "video": value, **options}
    raise BadRow("unknown form", f'a part has the type {kind!r}; use "text" or "video"')


def _place_videos(messages: list[dict], given: list[Any], *, marks_count: bool) -> list[dict]:
    """Marks become parts, and the videos given next to the text go to their places, in order."""
    # Without videos next to it, `<video>` in TRL's messages is just something that a person wrote.
    if given or marks_count:
        messages = [
            {**message, "content": _split_at_marks(message["content"])}
            if message["role"] == "user" and isinstance(message["content"], str)
            else message
            for message in messages
        ]
    empty = [part for part in _video_parts(messages) if "video" not in part]
    if len(empty) != len(given):
        raise BadRow("videos and places differ", f"it has {len(empty)} place(s) for videos and {len(given)} video(s)")
    for part, video in zip(empty, given, strict=True):
        part["video"] = video
    return messages


def _split_at_marks(text: str) -> str | list[dict]:
    """`<video>` marks become parts. The processor writes the line feed between text and video, as for questions."""
    if VIDEO_MARK not in text:
        return text
    parts: list[dict] = []
    for content in re.split(f"({VIDEO_MARK})", text):
        if content == VIDEO_MARK:
            parts.append({"type": "video"})
        elif content.strip():
            parts.append({"type": "text", "text": content.strip()})
    return parts


__all__ = ["BadRow", "as_messages", "videos_in", "without_videos"]
