"""What the language model sees: it describes single events of unseen stories; how many of its words are right."""

from typing import Any

import torch

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


@torch.no_grad()
def tell_events(model, processor, num_stories: int, num_frames: int, *, swapped: bool = False) -> dict[str, Any]:
    """
    Args:
        num_stories: how many stories of split test, whose combinations of colour, shape and action were not trained
            on.
        swapped: show events of the next story instead.

    Returns:
        The `count` of events, and for `scene`, `colour`, `shape`, `action` and `all` four of them the share of events
        in which they were described correctly.
    """
    k, m = model.config.frames_per_segment, model.config.tokens_per_segment
    right: dict[str, list[bool]] = {name: [] for name in (*CHANCE, "all")}
    for index in range(num_stories):
        story, shown = (make_story(story_seed("test", index + offset)) for offset in (0, int(swapped)))
        frames = frames_at(shown, middle_times(shown, num_frames), size=processor.video_processor.size["height"])
        whole = model.encode_video(processor.video_processor.iter_pixel_values(frames, do_sample_frames=False))
        windows, seen = (windows_of(one, num_frames // k, 1, one.seed) for one in (story, shown))
        chosen = [seen[number % len(seen)] for number in range(len(windows))]
        pieces = tuple(whole.local_features[0][start * m : end * m] for start, end in chosen)
        chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TELL}]}]
        features = LongVLMVideoFeatures(
            local_features=pieces, global_features=whole.global_features.expand(len(pieces), -1, -1)
        )
        inputs = processor(
            text=processor.apply_chat_template([chat] * len(pieces), add_generation_prompt=True, tokenize=False),
            num_video_tokens=features.num_tokens(model.config),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        generated = model.generate(**inputs, video_features=features, max_new_tokens=16, do_sample=False)
        answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
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
