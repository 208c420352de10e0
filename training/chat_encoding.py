"""A chat becomes token ids and labels: the loss is on the answers and their end token, on nothing else.

A template that marks the answers (`{% generation %}`) is trusted. For other templates, the chat is rendered up to each
answer, ending with what opens the assistant's turn: what the whole text has beyond that is what the model must write.
The answers are located in the text first and in the tokens by their offsets, since a text tokenized in parts gives
other tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers.utils import logging

from longvlm.modeling_longvlm.plain_numbers import whole_number
from longvlm.processing.chat_templates_longvlm import CHAT_TEMPLATES
from longvlm.processing.processing_longvlm import VIDEO_TOKENS, assistant_masks
from longvlm.processing.text_escaping import ESCAPE_MARK
from longvlm.training.formats import BadRow, without_videos

logger = logging.get_logger(__name__)

IGNORED = -100


@dataclass
class EncodedChat:
    """The token ids of a chat, and for each position the id to predict there, or -100."""

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
    truncation: bool = False,
) -> EncodedChat:
    """
    Encodes a chat for training.

    Args:
        processor: a `LongVLMProcessor`.
        messages: of `as_messages`.
        token_counts: how many tokens each video of the chat has, in order.
        chat_template: a template or the name of one; replaces the processor's own.
        max_length: maximum number of tokens.
        truncation: cut a longer chat at its end, as the released code does, unless that would cut a video or leave no
            answer. Otherwise a longer chat is an error.

    Raises:
        BadRow: the chat is too long, has no answer to learn, or the chat template refuses it.
        ValueError: the tokenizer is not a fast one, or there is no such template.
    """
    if not processor.tokenizer.is_fast:
        raise ValueError(
            f"training needs the offsets of a fast tokenizer; {type(processor.tokenizer).__name__} is not one"
        )
    if max_length is not None:
        max_length = whole_number("max_length", max_length, 1)
    messages = without_videos(messages)
    template = _template_text(processor, chat_template)
    has_empty_answer = any(m["role"] == "assistant" and not m["content"].strip() for m in messages)
    if re.search(r"\{%-?\s*generation\b", template) and not has_empty_answer:
        with _refusals_as_bad_rows():
            encoded = processor.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                video_token_counts=list(token_counts),
            )
        ids, mask = encoded["input_ids"][0], encoded["assistant_masks"][0]
    else:
        with _refusals_as_bad_rows():
            text, spans = _render(processor, messages, template)
        encoded = processor(
            [text],
            video_token_counts=list(token_counts),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        ids = encoded["input_ids"][0]
        mask = assistant_masks([spans], encoded["offset_mapping"], encoded["text_replacement_offsets"])[0]
    labels = [token if in_answer else IGNORED for token, in_answer in zip(ids, mask, strict=True)]
    if max_length is not None and len(ids) > max_length:
        if not truncation:
            raise BadRow("too long", f"{len(ids)} tokens, `max_length` is {max_length}")
        video_ids = set(processor.tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS)))
        if any(token in video_ids for token in ids[max_length:]):
            raise BadRow("too long", f"{len(ids)} tokens, and `max_length` {max_length} would cut a video")
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels):
            raise BadRow("too long", f"`max_length` {max_length} would leave nothing of the answers")
    # Nothing predicts the first token.
    if all(label == IGNORED for label in labels[1:]):
        raise BadRow("no answer", "the chat template leaves nothing of the answers")
    return EncodedChat(list(ids), labels)


def _template_text(processor, name: str | None) -> str:
    known = processor.chat_template
    known = known if isinstance(known, dict) else {"default": known}
    if name is None:
        if "default" not in known:
            raise ValueError(f"choose a `chat_template`, one of {', '.join(known)}: none of them is the default")
        return known["default"]
    if name not in known and name not in CHAT_TEMPLATES and "{" not in name:
        names = ", ".join([*known, *CHAT_TEMPLATES])
        raise ValueError(f'`chat_template` "{name}" is neither a Jinja template nor one of {names}')
    return known.get(name) or CHAT_TEMPLATES.get(name, name)


@contextmanager
def _refusals_as_bad_rows() -> Iterator[None]:
    """Templates refuse chats (two user turns in a row, a system message) with `raise_exception`."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, TemplateError):
            raise BadRow("refused by the chat template", " ".join(str(error.__cause__).split())) from None
        raise
    except (OverflowError, RecursionError) as error:  # a range or a nesting that the sandbox does not allow
        raise BadRow("refused by the chat template", " ".join(str(error).split())) from None


def _render(processor, messages: list[dict], template: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and the span `[start, end)` of each answer in it, end token included."""

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
        # The mark may stand inside of what looks like a special token.
        pattern = re.compile(f"{ESCAPE_MARK}?".join(map(re.escape, answer)))
        # Some templates write more before the last answer than they open a turn with (an empty thought): then the
        # answer itself is searched for, after what came before.
        start = len(before) if is_prefix else max(position, _common(text, before))
        found = pattern.search(text, start)
        if found is None:
            raise BadRow("answer not found", f"the chat template changes message {number}")
        end = end_token.match(text, found.end())
        if end is None:
            logger.warning_once(
                "The chat template writes no end token after an answer: the model will not learn to stop."
            )
        position = end.end() if end else found.end()
        spans.append((start if is_prefix else found.start(), position))
    return text, spans


def _end_token_pattern(tokenizer) -> re.Pattern:
    """Matches what ends an answer: a special token, with or without white space before it."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*added, *tokenizer.all_special_tokens} - set(VIDEO_TOKENS)
    if tokenizer.bos_token != tokenizer.eos_token:
        tokens.discard(tokenizer.bos_token)
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def pad(sequences: Sequence[Sequence[int]], value: int, *, multiple_of: int | None = None) -> list[list[int]]:
    """Fills sequences with `value` on the right, to the length of the longest, rounded up to `multiple_of`."""
    length = max(map(len, sequences))
    if multiple_of:
        length = -(-length // multiple_of) * multiple_of
    return [[*sequence, *[value] * (length - len(sequence))] for sequence in sequences]


__all__ = ["IGNORED", "EncodedChat", "encode_chat", "pad"]
