"""The model card of longvlm-tiny: the common one, with sections of its own from what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from longvlm.evaluation.storyline.scoring import table
from longvlm.publishing.model_card import NO_BASE_MODEL, make_card, read_config

NAME = "longvlm-tiny"

_NOTICE = """\
**It knows nothing but Storyline**, a synthetic world of simple objects that move, grow, blink, turn, appear and leave,
one after the other. Its answers about a real video mean nothing. It knows only the words of Storyline's questions, and
gives one of Storyline's answers whatever it is asked."""

_USAGE = """\
It comes with the package `longvlm`, which also makes Storyline's videos:

```python
import longvlm
from longvlm.evaluation import storyline
from transformers import pipeline

story = storyline.make_story(storyline.story_seed("test", 0), duration=20)  # seconds
storyline.write_video(story, "story.mp4", fps=10, size=224)

ask = pipeline("video-question-answering", model=longvlm.tiny_checkpoint())
print(ask(video="story.mp4", question="What is the first object?")["answer"])
```"""

_DETAILS = """\
The stories of Storyline's test split are new to the model, and so are their combinations of colour, shape and action.
Each question was asked in a conversation of its own. Accuracy in percent by kind of question; in brackets a 95 %
bootstrap interval.

{table}

Chance is about 17 %, and guessing from the questions alone does no better (`docs/storyline.md` in the repository of
`longvlm`).{blind}

## Training

Every part is trained from scratch: a CLIP vision transformer for frames of {image_size} x {image_size} pixels, a
projector of two layers, and a language model with the architecture of SmolLM3, no rotary positions in its last
{layers_without_positions} layers, and a byte-level tokenizer of {vocabulary} entries.

`make tiny` runs the training, here with {machine}, {versions}:

{stages}

{note}Training data: stories of Storyline's train split, generated on the fly. No pictures, videos or texts of people.

1. The encoder is trained on single frames ({vision_training}): each patch predicts the shape and colour on it,
   where the object is, its size, rotation and opacity, and the scene; [CLS] predicts the same for the frame.
2. It is frozen. Stories are encoded and merged once ({stories}).
3. Projector and language model are trained on the features ({language_training}). Questions about one
   video are packed behind it and cannot see each other. Besides the answers there are auxiliary losses, whose linear
   heads are discarded afterwards: they predict what is on stage at the end of each segment, how it has moved and
   changed, and what came before; and at the end of a question, what it names. Three attention heads are taught to look
   from there at the event that contains the answer, and one to spread its attention equally over everything that "how
   many" counts. In the stage with all lengths, "how many" is asked about more colours, shapes and actions than in the
   benchmark, so that the numbers cannot be memorised.
4. For long videos, the positions of a quarter of the short ones are stretched (up to 1,600), and the last stage mixes
   all lengths."""

_BLIND = """ Without a video the model does not guess: {:.0f} % of what it says is then not an answer to the
question at all."""


def card_text(folder: str | Path, results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The whole README.md.

    Args:
        folder: the checkpoint.
        results: name -> scores, as in `scores.json`.
        about: what `build` knows about the training, as in `training.json`.
    """
    seconds = about["seconds"]
    minutes, rest = divmod(sum(seconds.values()), 60)
    stages = [f"- {name}: {one // 60} min {one % 60} s" for name, one in seconds.items()]
    config = read_config(Path(folder))
    details = _DETAILS.format(
        image_size=config.vision_config.image_size,
        layers_without_positions=config.text_config.no_rope_layers.count(0),
        vocabulary=config.text_config.vocab_size,
        table=table(results),
        blind=_BLIND.format(100 * results["no video"]["unparsed"]) if "no video" in results else "",
        stages="\n".join([*stages, f"- all: {minutes} min {rest} s"]),
        note=f"{about['note']}\n\n" if about.get("note") else "",
        **{name: about[name] for name in ("machine", "versions", "vision_training", "stories", "language_training")},
    )
    measured = [
        EvalResult(
            task_type="video-text-to-text",
            task_name="Video question answering",
            dataset_type="storyline",
            dataset_name=f"Storyline, {name}",
            dataset_config=name,
            dataset_split="test",
            metric_type="accuracy",
            metric_name="Accuracy in percent",
            metric_value=round(100 * scores["accuracy"], 1),
        )
        for name, scores in results.items()
        if scores["run"]["video"] == "true"  # the others are controls
    ]
    card = make_card(
        folder,
        NAME,
        license="apache-2.0",
        base_model=[NO_BASE_MODEL],
        tags=["synthetic"],
        results=measured,
        notice=_NOTICE,
        usage=_USAGE,
        details=details,
    )
    return str(card)
