"""What is true at the end of each segment of a story: the scaffold that the language model learns on.

A question about a whole video teaches little: one word for a hundred tokens, and until the model can read objects and
keep their order, the word is noise. So while it trains, linear heads ask the hidden state at each segment's last token
for what has just been and what came before. The heads are thrown away afterwards.

What an object does is asked for in numbers, too: how far it has moved, grown, turned. A word for an action can be
guessed from who does it, for training does not show all combinations; a distance cannot.
"""

import math

import torch
from torch import Tensor

from longvlm.evaluation.storyline import ACTIONS, COLOURS, SCENES, SHAPES, Story, middle_times
from longvlm.evaluation.storyline.render import pose_at
from recipes.tiny.vision import pose_numbers

MOST = 9  # events that are told apart
FIELDS = (("colour", COLOURS), ("shape", SHAPES), ("action", ACTIONS))
# Asked of a low layer: what a segment shows. Of a higher one: what needs the segments before it.
SEEN = {"now_colour": len(COLOURS) + 1, "now_shape": len(SHAPES) + 1, "now_scene": len(SCENES)}
KNOWN = {
    "now_action": len(ACTIONS) + 1,
    **{f"before_{name}": len(values) + 1 for name, values in FIELDS},
    "number": MOST + 1,
    "news": 3,
    "most_scene": len(SCENES),
}
HEADS = {**SEEN, **KNOWN}
# Numbers, asked of a low layer and of a middle one.
POSE = ("x", "y", "radius", "cosine", "sine", "opacity")  # see `vision.pose_numbers`
CHANGE = ("x", "y", "radius", "angle", "opacity", "hidden")  # since the event began; about 1 or -1 at its end
# Asked of a question's end and of a segment's end by the same heads: what is named, and what is there. So both are
# written in the same way, and attention can compare them. "after the red star" is where a red star came before.
NAMED = {f"{when}_{name}": len(values) + 1 for when in ("now", "before") for name, values in FIELDS}
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
    `number`: how many events have begun. `news`: 1 where an event begins, 2 where one has ended and none began, else
    0. `most_scene`: the scene of most of the video so far.
    """
    times = middle_times(story, num_frames)
    events = segment_events(story, num_frames, frames_per_segment).tolist()
    rows, previous, scenes = [], -1, [SCENES.index(story.scene_at(time).kind) for time in times]
    for first, number in zip(range(0, num_frames, frames_per_segment), events, strict=True):
        inside = times[first : first + frames_per_segment]
        begun = sum(event.start <= inside[-1] for event in story.events)
        now = None if number < 0 else number
        before = begun - 1 if now is None else now - 1
        so_far = scenes[: first + len(inside)]
        row = {"now_scene": so_far[-1], "most_scene": max(so_far, key=so_far.count), "number": min(begun, MOST)}
        for name, values in FIELDS:
            row[f"now_{name}"] = len(values) if now is None else values.index(getattr(story.events[now], name))
            row[f"before_{name}"] = len(values) if before < 0 else values.index(getattr(story.events[before], name))
        row["news"] = 0 if number == previous else 1 if number >= 0 else 2
        previous = number
        if now is not None:
            event = story.events[now]
            # What an object does shows only after a while.
            if (inside[-1] - event.start) / (event.end - event.start) < 0.5:
                row["now_action"] = IGNORED
        rows.append([row[name] for name in HEADS])
    return torch.tensor(rows)


def segment_motion(story: Story, num_frames: int, frames_per_segment: int) -> Tensor:
    """`(segments, 12)` float32, NaN where there is no event: of the event in most of the segment's frames, the means
    of `POSE` over those frames, and `CHANGE` from the event's first frame to the last of them.
    """
    times = middle_times(story, num_frames)
    numbers = segment_events(story, num_frames, frames_per_segment).tolist()
    rows = []
    for first, number in zip(range(0, num_frames, frames_per_segment), numbers, strict=True):
        if number < 0:
            rows.append([math.nan] * (len(POSE) + len(CHANGE)))
            continue
        event = story.events[number]
        of_event = [time for time in times if event.start <= time < event.end]
        here = [time for time in times[first : first + frames_per_segment] if event.start <= time < event.end]
        start, end = pose_at(event, of_event[0]), pose_at(event, here[-1])
        poses = [pose_numbers(pose_at(event, time), event.shape) for time in here]
        hidden = sum(pose_at(event, time).opacity == 0 for time in of_event if time <= here[-1])
        change = (
            (end.x - start.x) / 0.45,
            (end.y - start.y) / 0.45,
            math.log(end.radius / start.radius),
            (end.angle - start.angle) / 180,
            end.opacity - start.opacity if event.action != "blink" else 0.0,
            hidden / len(of_event) / 0.4,  # two of five phases
        )
        rows.append([*(sum(values) / len(here) for values in zip(*poses, strict=True)), *change])
    return torch.tensor(rows, dtype=torch.float32)
