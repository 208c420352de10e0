"""The model card of longvlm-tiny, from what was measured."""

from collections.abc import Mapping
from typing import Any

from longvlm.evaluation.storyline.scoring import table

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
tags: [longvlm, video, synthetic]
---

# longvlm-tiny

The method of LongVLM (ECCV 2024) at the smallest size that works: {parameters:.1f} million parameters,
{megabytes:.1f} MB. It answers questions about videos of Storyline, a synthetic world of simple objects that move,
grow, blink, turn, appear and leave, one after the other. It comes with the package `longvlm`.

```python
import longvlm
from transformers import pipeline

pipe = pipeline("video-question-answering", model=longvlm.tiny_checkpoint())
pipe(video="story.mp4", question="What is the first object?")["answer"]
```

## What it cannot do

It has seen nothing but Storyline. Of a real video it knows nothing, and its answers there mean nothing. It knows no
words but those of Storyline's questions, and says one of Storyline's answers whatever it is asked.

## What it is

- Encoder: a CLIP vision transformer, {vision}, trained from nothing.
- Method: {frames_per_segment} frames a segment, merged into {tokens_per_segment} tokens (a tenth of them in each step,
  kept in order of time); {num_global_layers} global tokens before them. 100 frames are {num_video_tokens} tokens.
- Projector: two layers. Language model: SmolLM3's architecture, {text}, no rotary
  positions in the last two, with a byte-level tokenizer of {vocabulary} entries.

## How well it does it

Storyline's test split: other stories than in training, and only combinations of colour, shape and action that training
never showed. Each question was asked alone. Accuracy in percent; in brackets a 95 % bootstrap interval.

{table}

Chance is about 17 %, and so is what can be guessed from the questions (docs/storyline.md).{blind}

## How it was made

`make tiny` trains it from nothing, here with {machine}, {versions}:

{stages}

{note}Training data: stories of Storyline's train split, made on the fly. No pictures, videos or texts of people.

1. The encoder learns on single frames ({vision_training}): each patch names the shape and colour over it, where the
   object is, how large, how turned, how opaque, and the scene; [CLS] says the same of the frame.
2. It is frozen; stories are encoded and merged once ({stories}).
3. Projector and language model learn from the features ({language_training}). Questions about one video are packed
   behind it and cannot see each other. Beside the answers, linear heads that are thrown away afterwards ask the hidden
   states at each segment's end what is on stage, how it has moved and changed, and what came before, and at a
   question's end what it names; three attention heads are taught to look from there at the event that holds the
   answer, and one to share its attention equally among all that "how many" counts. On all lengths, "how many" is
   asked of more colours, shapes and actions than in the benchmark, whose numbers it would know by heart.
4. For long videos, the positions of a quarter of the short ones are stretched (up to 1,600); in the end lengths are
   mixed.
"""


_BLIND = """ Without a video it does not
guess: most of what it says then ({:.0f} %) is no answer at all."""


def card_text(results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """`results`: name -> scores; `about`: what `build` knows of the model and its training."""
    config, parameters = about["config"], about["parameters"]
    vision, text = config.vision_config, config.text_config
    minutes, rest = divmod(sum(about["seconds"].values()), 60)
    stages = [f"- {name}: {seconds // 60} min {seconds % 60} s" for name, seconds in about["seconds"].items()]
    return _CARD.format(
        parameters=parameters / 1e6,
        megabytes=parameters * 2 / 1e6,
        vision=f"{vision.num_hidden_layers} layers of width {vision.hidden_size} on {vision.image_size} x "
        f"{vision.image_size} pixels",
        text=f"{text.num_hidden_layers} layers of width {text.hidden_size}",
        vocabulary=text.vocab_size,
        frames_per_segment=config.frames_per_segment,
        tokens_per_segment=config.tokens_per_segment,
        num_global_layers=config.num_global_layers,
        num_video_tokens=config.num_video_tokens(100),
        stages="\n".join([*stages, f"- all: {minutes} min {rest} s"]),
        table=table(results),
        blind=_BLIND.format(100 * results["no video"]["unparsed"]) if "no video" in results else "",
        note=f"{about['note']}\n\n" if about.get("note") else "",
        **{name: about[name] for name in ("machine", "versions", "vision_training", "stories", "language_training")},
    )
