"""What longvlm-tiny is made of: its tokenizer, its prompt, its processor and its untrained language model."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, SmolLM3Config, set_seed

from longvlm.evaluation.storyline import make_questions, make_story, story_seed
from longvlm.processing.processing_longvlm import VIDEO_TOKENS
from longvlm.registration import (
    LongVLMConfig,
    LongVLMForConditionalGeneration,
    LongVLMProcessor,
    LongVLMVideoProcessor,
)
from recipes.tiny.vision import FRAME_SIZE, MEAN, PATCH_SIZE, STD

NUM_FRAMES = 100
VOCABULARY = 512  # bytes and their merges; Storyline's words are a token each, other text costs more
SPECIAL = ("<pad>", "<s>", "</s>", *VIDEO_TOKENS)

# No system text: a question costs about 15 tokens, and it should stay so.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
    {%- elif message.role == 'user' -%}
        {{- message.content + '\n=' -}}
    {%- else -%}
        {{- message.content + '\n' -}}
    {%- endif -%}
{%- endfor -%}
"""


def make_tokenizer(num_stories: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on questions and answers of split train. Any text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(num_stories), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": list(VIDEO_TOKENS)})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts(num_stories: int) -> Iterable[str]:
    for number in range(num_stories):
        for question in make_questions(make_story(story_seed("train", number)), per_kind=2):
            yield f"{question.question}\n= {question.answer}"
            yield f" {' '.join(question.choices)}"


def gentle_schedule(tokens: int, tokens_left: int) -> list[int]:
    """A tenth of the tokens merges in each step: halving forces small objects into what surrounds them."""
    schedule = []
    while tokens > tokens_left:
        schedule.append(min(max(tokens // 10, 1), tokens - tokens_left))
        tokens -= schedule[-1]
    return schedule


# Fields of `LongVLMConfig`: 100 frames are 50 segments of 3 tokens, and E = 2 global ones. What an object does is seen
# between segments, for all its patches in a segment become one token: so segments are short.
K, M = 2, 3
METHOD: dict[str, Any] = {
    "frames_per_segment": K,
    "tokens_per_segment": M,
    "num_global_layers": 2,
    "vision_feature_layer": -1,
    "merge_num_heads": 4,
    "merge_order": "time",
    "merge_schedule": gentle_schedule(K * (FRAME_SIZE // PATCH_SIZE) ** 2, M),
}


def make_config(vision: CLIPVisionModel, tokenizer, *, width: int = 192, **method) -> LongVLMConfig:
    """The configuration, untrained. `width`: of the LLM; `method`: fields that replace those of `METHOD`."""
    ids = dict(zip(("video_token_id", "video_start_token_id", "video_end_token_id"),
                   tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS)), strict=True))  # fmt: skip
    text = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=6,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        # The last two layers look things up, wherever they are: rotary positions would stand in the way.
        no_rope_layers=[1, 1, 1, 1, 0, 0],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    settings = {**METHOD, "projector_type": "mlp2x_gelu", "vision_chunk_frames": 64, **method}
    vision_config = vision.config.to_dict() | {"_name_or_path": ""}  # a folder of this run
    return LongVLMConfig(vision_config=vision_config, text_config=text.to_dict(), **ids, **settings)


def make_processor(config: LongVLMConfig, tokenizer, num_frames: int = NUM_FRAMES) -> LongVLMProcessor:
    video_processor = LongVLMVideoProcessor(
        num_frames=num_frames,
        size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LongVLMProcessor.from_config(config, tokenizer, video_processor)


def make_model(config: LongVLMConfig, vision: CLIPVisionModel, seed: int = 0) -> LongVLMForConditionalGeneration:
    """The trained encoder, and everything after it untrained; float32."""
    set_seed(seed)
    model = LongVLMForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.max_new_tokens = 16
    return model.to(torch.float32)
