"""Small tokenizers of the kinds that LLMs use, for tests of the processor.

`byte_level_tokenizer`: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), trained here in milliseconds.
`unigram_tokenizer`: SentencePiece unigram (T5, XGLM): special tokens are pieces, found after Unicode normalization.
`original_tokenizer`: SentencePiece BPE with byte fallback (LLaMA, Vicuna), of a tiny checkpoint in the
original's format: 384 pieces, then LLaVA's three image tokens.
"""

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tests.helpers.paths import FIXTURES

TEXTS = [
    "What is the man doing in the video?",
    "He is cooking pasta, and then he eats it.",
    "Who is running after the dog, and why?",
    "system user assistant video patch start end\n",
]
# Concatenates strings, as SmolLM2's and Qwen's do.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(
    chat_template: str | None = CHATML_TEMPLATE, add_prefix_space: bool = False, **options
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<|im_start|>`, `<|im_end|>` (end and padding) and the common word `<think>` added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["<think>"])
    names = {"unk_token": specials[0], "bos_token": specials[1], "eos_token": specials[2], "pad_token": specials[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})
    tokenizer.chat_template = chat_template
    return tokenizer


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over single letters, with bytes for the rest; a space is put in front of every word."""
    specials = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    pieces = [(piece, 0.0) for piece in specials] + [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(piece, -3.0) for piece in ["▁", "▁is", *string.ascii_letters, *"<>/_|?"]]
    backend = Tokenizer(models.Unigram(pieces, 0, True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="always")])
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def original_tokenizer(every_piece: bool = False) -> PreTrainedTokenizerFast:
    """
    LLaMA's kind, without a chat template and without a padding token of its own.

    every_piece: put a space in front of each piece of text between special tokens, as the fast tokenizer of the
    original's time did; today's puts it in front of the first one only.
    """
    tokenizer = LlamaTokenizer.from_pretrained(FIXTURES / "original_tokenizer", pad_token=None)
    if not every_piece:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    backend.pre_tokenizer = None
    # Not a LlamaTokenizer: that class would make its own normalizer again when it is loaded.
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
