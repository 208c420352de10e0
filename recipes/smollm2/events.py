"""What the language model sees: it describes single events of unseen stories, and the right words are counted."""

from typing import Any

from longvlm.evaluation.storyline import (
    ACTIONS,
    COLOURS,
    SCENES,
    SHAPES,
    frames_at,
    make_story,
    middle_times,
    story_seed,
)
from longvlm.evaluation.storyline.questions import DOES
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMVideoFeatures
from recipes.tiny.pieces import piece_of, windows_of

TELL = "Tell the story of the video."
CHANCE = {
    "scene": 1 / len(SCENES),
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "action": 1 / len(ACTIONS),
}


def tell_events(engine, num_stories: int, num_frames: int, *, swapped: bool = False) -> dict[str, Any]:
    """
    Args:
        engine: a `LongVLMEngine`.
        num_stories: number of stories of split test, whose combinations of colour, shape and action are new.
        num_frames: number of frames per story.
        swapped: show events of the next story instead.

    Returns:
        `count` of events, and the fraction of them whose scene, colour, shape and action were right, and all four.
    """
    k, m = engine.model.config.frames_per_segment, engine.model.config.tokens_per_segment
    size = engine.processor.video_processor.size["height"]
    right: dict[str, list[bool]] = {name: [] for name in (*CHANCE, "all")}
    for index in range(num_stories):
        story, shown = (make_story(story_seed("test", index + offset)) for offset in (0, int(swapped)))
        frames = frames_at(shown, middle_times(shown, num_frames), size=size)
        whole = engine.encode(frames, do_sample_frames=False)
        windows, seen = (windows_of(one, num_frames // k, 1, one.seed) for one in (story, shown))
        chosen = [seen[number % len(seen)] for number in range(len(windows))]
        conversations = []
        for start, end in chosen:
            clip = LongVLMVideoFeatures(
                local_features=(whole.local_features[0][start * m : end * m],), global_features=whole.global_features
            )
            content = [{"type": "video", "video": clip}, {"type": "text", "text": TELL}]
            conversations.append([{"role": "user", "content": content}])
        answers = engine.generate(conversations, max_new_tokens=16, do_sample=False)
        for (start, end), answer in zip(windows, answers, strict=True):
            piece = piece_of(story, num_frames, start * k, end * k)
            (event,) = piece.events
            truth = (piece.scene_at(piece.duration / 2).kind, event.colour, event.shape, DOES[event.action])
            scene, _, description = answer.strip().partition(": ")
            words = (scene, *description.split(" ", 2), "", "", "")
            hits = [word == name for word, name in zip(words, truth, strict=False)]
            for name, hit in zip(right, (*hits, all(hits)), strict=True):
                right[name].append(hit)
    return {"count": len(right["all"]), **{name: sum(hits) / len(hits) for name, hits in right.items()}}


__all__ = ["CHANCE", "TELL", "tell_events"]
