"""User text that looks like a special token stays text: a question may contain `</s>` or `<vid_patch>`.

`escape` puts one invisible character, the mark, into each such string, so that neither a tokenizer nor a search for
placeholders finds a special token there. `tokenizer_for_escaped_text` returns a copy of the tokenizer that drops the
mark after it has looked for special tokens and before its model sees the text. Everything else (splitting, spaces,
offsets, padding, truncation) stays the tokenizer's own, and decoding gives the text as it was typed.
"""

import copy
import itertools
import re
from collections.abc import Iterable

from tokenizers import pre_tokenizers

# The last private-use character of Unicode: no text needs it, no normalizer changes it, no font shows it.
ESCAPE_MARK = "\U0010fffd"


def escape(text: str, special_strings: Iterable[str], *, continues: bool = False) -> str:
    """
    Marks every occurrence of `special_strings` in `text`, overlapping ones included. Earlier marks are dropped.

    continues: other text may be put behind this one, with or without white space: what could become a special string
        then is marked as well.
    """
    text = text.replace(ESCAPE_MARK, "")
    # A string of one character has no inside to mark.
    known = [string for string in special_strings if len(string) > 1]
    strings = "|".join(map(re.escape, known))
    if not strings:
        return text
    starts = {match.start() for match in re.finditer(f"(?={strings})", text)}
    if continues:
        written = text.rstrip()
        first = max(len(written) - max(map(len, known)) + 1, 0)
        beginnings = ((start, written[start:]) for start in range(first, len(written)))
        starts |= {start for start, tail in beginnings if any(string.startswith(tail) for string in known)}
    cuts = [0, *(start + 1 for start in sorted(starts)), len(text)]
    return ESCAPE_MARK.join(text[start:end] for start, end in itertools.pairwise(cuts))


def unescape(text: str) -> str:
    """The text as it was typed."""
    return text.replace(ESCAPE_MARK, "")


def tokenizer_for_escaped_text(tokenizer):
    """A copy of `tokenizer` that treats marked strings as plain text; offsets refer to the text with its marks."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot take special tokens as plain text; remove them from the text or use a "
            "tokenizer of the tokenizers library"
        )
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    # What the earlier steps turn the mark into: itself or, in a byte-level tokenizer, the letters for its bytes.
    sample = f"<{ESCAPE_MARK}a"
    if backend.normalizer is not None:
        sample = backend.normalizer.normalize_str(sample)
    if backend.pre_tokenizer is not None:
        sample = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(sample))
    mark = sample[sample.index("<") + 1 : sample.rindex("a")]
    if mark:
        steps = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.Split(mark, "removed")])
    return tokenizer
