"""Messages as dicts, whatever callers have them as: dicts, dataclasses, pydantic models (OpenAI's), other objects."""

import dataclasses
from collections.abc import Mapping


def plain_messages(conversation) -> list[dict]:
    """
    The messages of a conversation as dicts, without keys whose value is `None`, and their parts as dicts.

    Raises:
        ValueError: one of them has no role.
    """
    messages = []
    for given in getattr(conversation, "messages", conversation):
        message = _fields(given, "role")
        if message is None or message["role"] is None:
            raise ValueError(f'messages must be dicts or objects with "role" and "content", not {given!r:.80}')
        plain = {key: _plain(value) for key, value in message.items() if key != "content" and value is not None}
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [plain_part(part) for part in content]
        messages.append(plain if content is None else {**plain, "content": content})
    return messages


def is_message(value) -> bool:
    """Whether `value` is a message; lists and conversations are not."""
    return _fields(value, "role") is not None


def plain_part(part):
    """A part of a message's content: an object as a dict, others as they are. What the part holds is not touched."""
    fields = _fields(part, "type")
    if fields is None:
        return part
    address = _fields(fields.get("video_url"), "url")
    return fields if address is None else {**fields, "video_url": address}


def _fields(value, name: str) -> dict | None:
    """The fields of a dict or an object that has a field `name`; those of an object only as far as they are filled."""
    if isinstance(value, Mapping):
        return dict(value) if name in value else None
    if isinstance(value, type) or not hasattr(value, name):
        return None
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        fields = dict(value)  # pydantic: model_dump() would copy the videos
    else:
        public = {key: field for key, field in getattr(value, "__dict__", {}).items() if key[:1] != "_"}
        fields = {**public, **{key: getattr(value, key) for key in (*_OF_MESSAGES, *_OF_PARTS) if hasattr(value, key)}}
    fields = {key: field for key, field in fields.items() if field is not None}
    return fields if name in fields else None


# Those that may also be slots or properties of other objects.
_OF_MESSAGES = ("role", "content", "name", "tool_calls", "tool_call_id")
_OF_PARTS = ("type", "text", "video", "path", "url", "video_url")


def _plain(value):
    """Objects inside a message (tool calls) as dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return value
