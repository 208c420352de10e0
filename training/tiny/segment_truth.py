"""What is true at the end of each segment of a story: the scaffold that the language model learns on.

A question about a whole video teaches little: one word for a hundred tokens, and until the model can read objects and
keep their order, the word is noise. So while it trains, linear heads ask the hidden state at each segment's last token
for what has just been and what came before. The heads are thrown away afterwards.
"""

import torch
from torch import Tensor

from longvlm.evaluation.storyline import ACTIONS, COLOURS, SCENES, SHAPES, Story, middle_times

MOST = 9  # events, or events of one kind, that are told apart
FIELDS = (("colour", COLOURS), ("shape", SHAPES), ("action", ACTIONS))
# Asked of a low layer: what a segment shows. Of a higher one: what needs the segments before it.
SEEN = {"now_colour": len(COLOURS) + 1, "now_shape": len(SHAPES) + 1, "now_scene": len(SCENES)}
KNOWN = {
    "now_action": len(ACTIONS) + 1,
    **{f"before_{name}": len(values) + 1 for name, values in FIELDS},
    **{f"nth_{name}": MOST + 1 for name, _ in FIELDS},
    "number": MOST + 1,
}
HEADS = {**SEEN, **KNOWN}
# Asked of a question's end and of a segment's end by the same heads: what is named, and what is there. So both are
# written in the same way, and attention can compare them.
NAMED = {name: len(values) + 1 for name, values in FIELDS}
IGNORED = -100


def segment_events(story: Story, num_frames: int, frames_per_segment: int) -> Tensor:
    """`(segments,)` int64: the number of the event in most of the segment's frames, -1 where there is none."""
    times = middle_times(story, num_frames)
    events = []
    for first in range(0, num_frames, frames_per_segment):
        inside = times[first : first + frames_per_segment]
        on_stage = [i for time in inside for i, event in enumerate(story.events) if event.start <= time < event.end]
        events.append(max(set(on_stage), key=on_stage.count) if on_stage else -1)
    return torch.tensor(events)


def segment_truth(story: Story, num_frames: int, frames_per_segment: int) -> Tensor:
    """`(segments, heads)` int64 in the order of `HEADS`; -100 where the question has no answer yet.

    `now_*`: the event in most of the segment's frames, or "none" (the last number). `before_*`: the event before it.
    `nth_colour`: as how many-th event of its colour it came. `number`: how many events have begun.
    """
    times = middle_times(story, num_frames)
    events = segment_events(story, num_frames, frames_per_segment).tolist()
    rows = []
    for first, number in zip(range(0, num_frames, frames_per_segment), events, strict=True):
        inside = times[first : first + frames_per_segment]
        begun = sum(event.start <= inside[-1] for event in story.events)
        now = None if number < 0 else number
        before = begun - 1 if now is None else now - 1
        row = {"now_scene": SCENES.index(story.scene_at(inside[-1]).kind), "number": min(begun, MOST)}
        for name, values in FIELDS:
            row[f"now_{name}"] = len(values) if now is None else values.index(getattr(story.events[now], name))
            row[f"before_{name}"] = len(values) if before < 0 else values.index(getattr(story.events[before], name))
            row[f"nth_{name}"] = 0
            if now is not None:
                same = [getattr(event, name) == getattr(story.events[now], name) for event in story.events[: now + 1]]
                row[f"nth_{name}"] = min(sum(same), MOST)
        if now is not None:
            event = story.events[now]
            # What an object does shows only after a while.
            if (inside[-1] - event.start) / (event.end - event.start) < 0.5:
                row["now_action"] = row["nth_action"] = IGNORED
        rows.append([row[name] for name in HEADS])
    return torch.tensor(rows)
