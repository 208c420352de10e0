"""The model card of longvlm-tiny: the common one, with sections of its own from what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from longvlm.evaluation.storyline.scoring import table
from longvlm.publishing.model_card import NO_BASE_MODEL, make_card

NAME = "longvlm-tiny"

_USAGE = """\
It comes with the package `longvlm`:

```python
import longvlm
from transformers import pipeline

ask = pipeline("video-question-answering", model=longvlm.tiny_checkpoint())
print(ask(video="story.mp4", question="What is the first object?")["answer"])
```

**It knows nothing but Storyline**, a synthetic world of simple objects that move, grow, blink, turn, appear and leave,
one after the other. Its answers about a real video mean nothing. It knows only the words of Storyline's questions, and
gives one of Storyline's answers whatever it is asked."""

_DETAILS = """\
Storyline's test split consists of other stories than training, and its combinations of colour, shape and action do not
occur in training. Each question was asked in a conversation of its own. Accuracy in percent; in brackets a 95 %
bootstrap interval.

{table}

Chance is about 17 %, and so is what can be guessed from the questions (`docs/storyline.md`).{blind}

## Training

`make tiny` trains it from scratch, here with {machine}, {versions}:

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

_BLIND = """ Without a video it
does not guess: most of its answers ({:.0f} %) are then not an answer to the question at all."""


def card_text(folder: str | Path, results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """
    Args:
        folder: the checkpoint.
        results: name -> scores, as in `scores.json`.
        about: what `build` knows about the training, as in `training.json`.
    """
    seconds = about["seconds"]
    minutes, rest = divmod(sum(seconds.values()), 60)
    stages = [f"- {name}: {one // 60} min {one % 60} s" for name, one in seconds.items()]
    details = _DETAILS.format(
        table=table(results),
        blind=_BLIND.format(100 * results["no video"]["unparsed"]) if "no video" in results else "",
        stages="\n".join([*stages, f"- all: {minutes} min {rest} s"]),
        note=f"{about['note']}\n\n" if about.get("note") else "",
        **{name: about[name] for name in ("machine", "versions", "vision_training", "stories", "language_training")},
    )
    measured = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type="storyline",
            dataset_name=f"Storyline, {name}",
            dataset_config=name,
            dataset_split="test",
            metric_type="accuracy",
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
        usage=_USAGE,
        details=details,
    )
    return str(card)
