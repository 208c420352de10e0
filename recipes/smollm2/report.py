"""The page about SmolLM2 on Storyline, from what `recipes/smollm2/run.py` measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longvlm.evaluation.storyline import KINDS
from recipes.smollm2.events import CHANCE

TRAINED, CONTROLS = "trained", ("trained, another story's video", "trained, no video")
TOLD = ("lora-pieces", "lora-pieces, another story's events")
TRAININGS = ("projector", "lora-pieces", "lora-stories")

_PAGE = """\
# A real language model: SmolLM2-135M-Instruct on Storyline

`make smollm2` runs `python -m recipes.smollm2.run --out .cache/smollm2 --report docs/smollm2.md`. It assembles
SmolLM2-135M-Instruct (real weights, from a 4-bit GGUF file) with the encoder of longvlm-tiny, trains the projector,
then the projector and LoRA adapters of the language model, and asks questions about Storyline's test split. It uses
only the tools of the package; the `.yaml` files in its folder also work with `longvlm train`.

## What was trained, and on which data

| stage | what | steps | rows per step | seconds per step | seconds |
|---|---|---:|---:|---:|---:|
{stages}

Learning rates {rates}, on {machine};
{versions}.
The encoder stays frozen.

A video has {frames} frames, which become {video_tokens} tokens. The data come from {stories:,} stories of split train:

- projector: {events:,} pieces with one event each, to describe ("stripes: red star moves left");
- lora-pieces: {pieces:,} rows about pieces with up to three events, to describe or to answer a question about;
- lora-stories: {questions:,} questions of all kinds about whole stories, each in a conversation of its own.

The features of pieces are cut from those of the stories. Neither the stories of the test split nor their combinations
of colour, shape and action occur in training.

Mean loss in the first and in the last tenth of each training: {losses}.

## What it sees

The model describes {events_count} single events from {test_stories} stories of the test split; percent of right words:

{events_table}

## How well it answers

{test_stories} stories of the test split and {count} questions, each in a conversation of its own. Answers are free
text from `generate()`, scored by `evaluation/metrics/short_answer`. Accuracy in percent; for all with a 95 %
bootstrap interval.

{table}

Answers that name none or several of the possible answers count as wrong. Their share: {unparsed}.

## What this shows

Single events, with the right video and with that of another story: {seen}.
{reading}

One seed, one run, {minutes:.0f} minutes in all: this checks that training works with a real language model. It does
not measure how far it can get.
"""


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown. `results`: the content of `results.json`."""
    stages, scores, options = results["stages"], results["scores"], results["options"]
    trained = scores[TRAINED]
    seconds = sum(one["seconds"] for group in (stages, results["events"], scores) for one in group.values())
    return _PAGE.format(
        stages="\n".join(_stage_rows(stages, results["events"], scores)),
        machine=results["machine"],
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        rates=", ".join(f"{stages[name]['learning_rate']:g}" for name in TRAININGS),
        events=stages["rows"]["events"],
        pieces=stages["rows"]["pieces"],
        questions=stages["rows"]["stories"],
        stories=options["stories"],
        frames=options["frames"],
        video_tokens=stages["assemble"]["video_tokens"],
        losses="; ".join(f"{name} {_loss(stages[name]['losses'])}" for name in TRAININGS),
        test_stories=options["test_stories"],
        events_count=next(iter(results["events"].values()))["count"],
        events_table=_events_table(results["events"]),
        count=trained["count"],
        table=_table(results["chance"], scores),
        unparsed=", ".join(f"{100 * one['unparsed']:.0f} % ({name})" for name, one in scores.items()),
        seen=_seen(results["events"]),
        reading=_reading(results["chance"], scores),
        minutes=seconds / 60,
    )


def _stage_rows(stages: Mapping[str, Any], events: Mapping[str, Any], scores: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| assemble | SmolLM2, encoder, untrained projector | | | | {stages['assemble']['seconds']:.0f} |",
        f"| encode | {stages['features']['stories']:,} stories, once | | | | {stages['features']['seconds']:.0f} |",
    ]
    for name in TRAININGS:
        one = stages[name]
        what = f"{one['trained_parameters'] / 1e6:.1f} million parameters"
        if one["steps_before_it_was_stopped"]:
            what += f" (interrupted once; seconds from step {one['steps_before_it_was_stopped']} on)"
        steps = f"{one['steps']} | {one['batch_size']} | {one['seconds_per_step']}"
        rows.append(f"| {name} | {what} | {steps} | {one['seconds']:.0f} |")
    asking = sum(one["seconds"] for one in scores.values())
    telling = sum(one["seconds"] for one in events.values())
    rows.append(f"| describe | {len(events)} times {_any(events)['count']} events | | | | {telling:.0f} |")
    return [*rows, f"| ask | {len(scores)} times {_any(scores)['count']} questions | | | | {asking:.0f} |"]


def _any(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(scores.values()))


def _loss(losses: Sequence[Sequence[float]]) -> str:
    values = [loss for _, loss in losses]
    tenth = max(len(values) // 10, 1)
    first, last = (sum(part) / tenth for part in (values[:tenth], values[-tenth:]))
    return f"{first:.2f} and {last:.2f}"


def _table(chance: Mapping[str, float], scores: Mapping[str, Any]) -> str:
    lines = [
        f"| kind | questions | chance | {' | '.join(scores)} |",
        f"|---|{'---:|' * (len(scores) + 2)}",
    ]
    for kind in (kind for kind in KINDS if kind in _any(scores)["kinds"]):
        cells = [f"{100 * one['kinds'][kind]['accuracy']:.0f}" for one in scores.values()]
        count = _any(scores)["kinds"][kind]["count"]
        lines.append(f"| {kind} | {count} | {100 * chance[kind]:.0f} | {' | '.join(cells)} |")
    cells = [
        f"{100 * one['accuracy']:.1f} ({100 * one['accuracy_low']:.1f} to {100 * one['accuracy_high']:.1f})"
        for one in scores.values()
    ]
    return "\n".join(
        [*lines, f"| **all** | {_any(scores)['count']} | {100 * chance['all']:.1f} | {' | '.join(cells)} |"]
    )


def _events_table(events: Mapping[str, Mapping[str, Any]]) -> str:
    columns = (*CHANCE, "all")
    chance = {**CHANCE, "all": math.prod(CHANCE.values())}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, one in {"chance": chance, **events}.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * one[column]:.0f}' for column in columns)} |")
    return "\n".join(lines)


def _seen(events: Mapping[str, Mapping[str, Any]]) -> str:
    right, control = (events[name] for name in TOLD)
    return ", ".join(f"{name} {100 * right[name]:.0f} and {100 * control[name]:.0f} %" for name in CHANCE)


def _reading(chance: Mapping[str, float], scores: Mapping[str, Any]) -> str:
    """Whether answers depend on the video: their interval lies above those of both controls, and above chance."""

    def seen(pick) -> bool:
        low = pick(scores[TRAINED])["accuracy_low"]
        return all(low > pick(scores[name])["accuracy_high"] for name in CONTROLS)

    learned = [
        kind
        for kind, one in scores[TRAINED]["kinds"].items()
        if one["accuracy_low"] > chance[kind] and seen(lambda result, kind=kind: result["kinds"][kind])
    ]
    rest = [kind for kind in scores[TRAINED]["kinds"] if kind not in learned]
    if not seen(lambda result: result):
        start = "Over all questions, these numbers cannot tell the effect of the video from chance."
    else:
        start = "Over all questions, the answers depend on the video: with another one, or none, they are worse."
    parts = [start]
    if learned:
        parts.append(
            f"Above chance and both controls, beyond the intervals: {', '.join(sorted(learned, key=KINDS.index))}."
        )
    if rest:
        parts.append(
            f"Not distinguishable from guessing with so few questions: {', '.join(sorted(rest, key=KINDS.index))}."
        )
    return "\n".join(parts)


__all__ = ["page"]
