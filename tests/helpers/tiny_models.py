"""Tiny models for the tests: a whole LongVLM with random weights, built in well under a second.

    model, processor = tiny_longvlm()
    folder = save_tiny_longvlm(tmp_path / "model")

The vision tower is a CLIP of 2 layers (56 pixels, patches of 14: 16 patches a frame), the LLM a Llama of 2 layers,
the tokenizer knows bytes only. The answers are noise; the shapes and the plumbing are those of the real thing.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

VIDEO_TOKENS = ("<vid_patch>", "<vid_start>", "<vid_end>")


def tiny_vision_config(**changes):
    """CLIP vision tower: 56 x 56 pixels, patches of 14, width 64, 2 layers."""
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
    }
    return CLIPVisionConfig(**{**values, **changes})


def tiny_text_config(**changes):
    """Llama: width 32, 2 layers, 2 key-value heads; the vocabulary of `tiny_tokenizer()`."""
    values = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**values, **changes})


def tiny_tokenizer(*, video_tokens=True, chat_template=None):
    """Byte-level tokenizer: `<pad>`, `<s>`, `</s>`, one token per byte, and LongVLM's three tokens if asked."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    if video_tokens:
        fast.add_special_tokens({"additional_special_tokens": list(VIDEO_TOKENS)})
    fast.chat_template = chat_template
    return fast


def tiny_config(*, vision_config=None, text_config=None, **options):
    """`LongVLMConfig`: segments of 4 frames, 6 tokens a segment, 2 global tokens, 4 heads for the matching."""
    from longvlm import LongVLMConfig

    tokenizer = tiny_tokenizer()
    patch, start, end = tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS))
    values = {
        "vision_config": (vision_config or tiny_vision_config()).to_dict(),
        "text_config": (text_config or tiny_text_config()).to_dict(),
        "frames_per_segment": 4,
        "tokens_per_segment": 6,
        "num_global_layers": 2,
        "merge_num_heads": 4,
        "video_token_id": patch,
        "video_start_token_id": start,
        "video_end_token_id": end,
    }
    return LongVLMConfig(**{**values, **options})


def tiny_processor(config, *, tokenizer=None, **video_options):
    """The processor that fits `config`; 8 frames a video unless asked otherwise."""
    from longvlm import LongVLMProcessor, LongVLMVideoProcessor

    side = config.vision_config.image_size
    values = {"num_frames": 8, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return LongVLMProcessor.from_config(
        config,
        tokenizer if tokenizer is not None else tiny_tokenizer(),
        LongVLMVideoProcessor(**{**values, **video_options}),
    )


def tiny_longvlm(*, vision_config=None, text_config=None, seed=0, **options):
    """`(model, processor)` with random weights, in eval mode."""
    from longvlm import LongVLMForConditionalGeneration

    config = tiny_config(vision_config=vision_config, text_config=text_config, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongVLMForConditionalGeneration(config).eval()
    return model, tiny_processor(config)


def save_tiny_longvlm(folder, **options) -> Path:
    """Writes the model and its processor as one checkpoint folder."""
    model, processor = tiny_longvlm(**options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def save_tiny_llm(folder, *, chat_template=None, text_config=None, **changes) -> Path:
    """Writes a Llama of its own (no video tokens) with its tokenizer, as a starting point for `assemble`."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(video_tokens=False, chat_template=chat_template)
    config = text_config or tiny_text_config(**{"vocab_size": len(tokenizer), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    return Path(folder)


def noise_video(*frames: int, seed=0, size=56):
    """Normalised frames `(videos, max(frames), 3, size, size)`: neighbours look alike."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(frames), max(frames), 3, size, size)
    return torch.randn(shape[0], 1, *shape[2:], generator=generator) + 0.5 * torch.randn(shape, generator=generator)
