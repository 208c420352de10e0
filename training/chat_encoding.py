"""A chat becomes token ids and labels: loss on what the assistant says and its end token, on nothing else.

A template that marks the assistant's words (`{% generation %}`) is taken at its word. For others, the chat is rendered
up to each answer with the opening of the assistant's turn: what the whole text has beyond that is what the model must
write. Always characters first, then tokens by their offsets: pieces tokenized alone are other tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from longvlm.processing.chat_templates_longvlm import CHAT_TEMPLATES
from longvlm.processing.processing_longvlm import VIDEO_TOKENS, assistant_masks
from longvlm.processing.text_escaping import ESCAPE_MARK
from longvlm.training.formats import BadRow, without_videos

logger = logging.get_logger(__name__)

IGNORED = -100
TOO_LONG = ("drop", "truncate")


@dataclass
class EncodedChat:
    """Token ids of a chat, and for each the id to be predicted in its place, or -100."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_chat(
    processor,
    messages: list[dict],
    token_counts: Sequence[int] = (),
    *,
    chat_template: str | None = None,
    max_length: int | None = None,
    too_long: str = "drop",
) -> EncodedChat:
    """
    Args:
        processor: a `LongVLMProcessor`.
        messages: of `as_messages`.
        token_counts: tokens of each video of the chat, in order.
        chat_template: instead of the processor's own.
        max_length: tokens at most.
        too_long: what happens to a longer chat: `"drop"` raises; `"truncate"` cuts it at its end, as the released code
            does, unless that would cut a video or leave no answer.

    Raises:
        BadRow: it is too long, or no token of an answer is found in it.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f'too_long="{too_long}" is not known; use {" or ".join(TOO_LONG)}')
    if not processor.tokenizer.is_fast:
        raise ValueError(
            f"training needs a fast tokenizer, for its offsets; {type(processor.tokenizer).__name__} is none"
        )
    messages = without_videos(messages)
    template = _template_text(processor, chat_template)
    silent = any(m["role"] == "assistant" and not m["content"].strip() for m in messages)
    if re.search(r"\{%-?\s*generation\b", template) and not silent:
        encoded = processor.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            num_video_tokens=list(token_counts),
        )
        ids, mask = encoded["input_ids"][0], encoded["assistant_masks"][0]
    else:
        text, spans = _render(processor, messages, template)
        encoded = processor(
            [text],
            num_video_tokens=list(token_counts),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        ids = encoded["input_ids"][0]
        mask = assistant_masks([spans], encoded["offset_mapping"], encoded["text_replacement_offsets"])[0]
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    if max_length is not None and len(ids) > max_length:
        if too_long == "drop":
            raise BadRow("too long", f"{len(ids)} tokens, max_length is {max_length}")
        of_video = set(processor.tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS)))
        if any(token in of_video for token in ids[max_length:]):
            raise BadRow("too long", f"{len(ids)} tokens, and max_length {max_length} would cut a video")
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels):
            raise BadRow("too long", f"max_length {max_length} would leave nothing of the answers")
    # The first token is predicted by nothing.
    if all(label == IGNORED for label in labels[1:]):
        raise BadRow("no answer", "the chat template leaves nothing of the answers")
    return EncodedChat(list(ids), labels)


def _template_text(processor, name: str | None) -> str:
    known = processor.chat_template
    known = known if isinstance(known, dict) else {"default": known}
    if name is None:
        if "default" not in known:
            raise ValueError(f"choose a chat_template, one of {', '.join(known)}: none of them is the default")
        return known["default"]
    if name not in known and name not in CHAT_TEMPLATES and "{" not in name:
        names = ", ".join([*known, *CHAT_TEMPLATES])
        raise ValueError(f'chat_template="{name}" is neither a Jinja template nor one of {names}')
    return known.get(name) or CHAT_TEMPLATES.get(name, name)


def _render(processor, messages: list[dict], template: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and where in it, `[start, end)`, each answer with its end token lies."""

    def render(messages, **options) -> str:
        return processor.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    text, spans, position = render(messages), [], 0
    end_token = _end_token_pattern(processor.tokenizer)
    for number, message in enumerate(messages):
        answer = message["content"].strip() if message["role"] == "assistant" else ""
        if not answer:
            continue
        before = render(messages[:number], add_generation_prompt=True)
        is_prefix = len(before) >= position and text.startswith(before)
        # The mark may stand within what looks like a special token.
        said = re.compile(f"{ESCAPE_MARK}?".join(map(re.escape, answer)))
        # Some templates write more before the last answer than they open a turn with (an empty thought): then the
        # answer itself is looked for, after what came before.
        start = len(before) if is_prefix else max(position, _common(text, before))
        found = said.search(text, start)
        if found is None:
            raise BadRow("answer not found", f"the chat template does not write message {number} as it is")
        end = end_token.match(text, found.end())
        if end is None:
            logger.warning_once(
                "The chat template writes no end token after an answer: the model will not learn to stop."
            )
        position = end.end() if end else found.end()
        spans.append((start if is_prefix else found.start(), position))
    return text, spans


def _end_token_pattern(tokenizer) -> re.Pattern:
    """A special token, with white space before it: the first thing after an answer that ends it."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*added, *tokenizer.all_special_tokens} - set(VIDEO_TOKENS)
    if tokenizer.bos_token != tokenizer.eos_token:
        tokens.discard(tokenizer.bos_token)
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def pad(rows: Sequence[Sequence[int]], value: int, *, multiple_of: int | None = None) -> list[list[int]]:
    """Rows of one length, filled on the right."""
    length = max(map(len, rows))
    if multiple_of:
        length = -(-length // multiple_of) * multiple_of
    return [[*row, *[value] * (length - len(row))] for row in rows]


__all__: list[Any] = ["IGNORED", "TOO_LONG", "EncodedChat", "encode_chat", "pad"]
