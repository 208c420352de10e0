"""Training of longvlm-tiny: what the packed lessons promise, and that an interrupted stage goes on."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from longvlm.evaluation.storyline import KINDS, make_questions, make_story, story_seed
from longvlm.evaluation.storyline.questions import NUMBERS
from recipes.tiny import vision as tiny_vision
from recipes.tiny.language import LOOKING_HEADS, LOOKING_LAYER, LanguageWithHeads, train_language
from recipes.tiny.lessons import IGNORED, Lessons, PromptMaker, load_lessons, make_lesson, pack
from recipes.tiny.loop import steps_done
from recipes.tiny.pointing import counted_in, counting_more, event_of
from recipes.tiny.recipe import METHOD, make_config, make_model, make_processor, make_tokenizer
from recipes.tiny.segment_truth import (
    CHANGE,
    HEADS,
    NAMED,
    POSE,
    segment_events,
    segment_motion,
    segment_truth,
)
from recipes.tiny.story_features import StoryVideos, encode_stories

PLAN = [(2, {12: 1.0})]
FRAMES, TOKENS = METHOD["frames_per_segment"], METHOD["tokens_per_segment"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model and processor with an untrained encoder, and lessons of two stories of 12 frames."""
    torch.manual_seed(0)
    vision = tiny_vision.CLIPVisionModel(tiny_vision.vision_config())
    tokenizer = make_tokenizer(40)
    config = make_config(vision, tokenizer)
    processor, model = make_processor(config, tokenizer), make_model(config, vision)
    reader = encode_stories(model, processor, tmp_path_factory.mktemp("features"), StoryVideos("train", range(2), 12))
    lessons = load_lessons(reader, processor, split="train", frames_per_segment=FRAMES, per_kind=2)
    return model, processor, lessons


def test_packed_questions_get_the_logits_that_each_gets_alone(parts):
    """So no question sees another, and training is what asking will be."""
    model, processor, lessons = parts
    story_lessons, prompts = lessons[12], PromptMaker(processor)
    asked = [one.questions[:5] for one in story_lessons]
    batch = pack(story_lessons, asked, prompts)
    seen = []
    learner = LanguageWithHeads(model)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        learner(**batch)
    hook.remove()
    packed = seen[0]  # one row for each label, story after story

    alone = []
    for lesson, questions in zip(story_lessons, asked, strict=True):
        features = {"local_features": (lesson.local.float(),), "global_features": lesson.global_[None].float()}
        for _, ids, prompt_length, *_ in questions:
            prefix = prompts.prefix(len(lesson.local) + len(lesson.global_))
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prefix + ids]), video_features=features).logits[0]
            alone.append(logits[len(prefix) + prompt_length - 1 : -1])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_prompts_are_those_of_the_processor(parts):
    _, processor, lessons = parts
    prompts, lesson = PromptMaker(processor), lessons[12][0]
    question = make_questions(make_story(story_seed("train", 0)), per_kind=2)[0]
    kind, ids, prompt_length, *_ = lesson.questions[0]
    count = processor.num_video_tokens(12)
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.question}]},
        {"role": "assistant", "content": question.answer},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    whole = prompts.prefix(count) + ids
    assert whole == processor(text=text, num_video_tokens=[count])["input_ids"][0]
    prompt = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert (
        prompts.prefix(count) + ids[:prompt_length] == processor(text=prompt, num_video_tokens=[count])["input_ids"][0]
    )
    assert kind == question.kind


def test_segment_truth_tells_what_the_renderer_draws():
    from longvlm.evaluation.storyline import COLOURS, SHAPES, Renderer, middle_times

    for index in range(6):
        story = make_story(story_seed("train", index))
        truth = dict(zip(HEADS, segment_truth(story, 100, 4).T, strict=True))
        renderer, times = Renderer(story, 64), middle_times(story, 100)
        for segment in range(25):
            seen = [renderer.truth_at(time) for time in times[4 * segment : 4 * segment + 4]]
            if all(one.event == seen[0].event for one in seen):
                colour = len(COLOURS) if seen[0].colour is None else COLOURS.index(seen[0].colour)
                shape = len(SHAPES) if seen[0].shape is None else SHAPES.index(seen[0].shape)
                assert (truth["now_colour"][segment], truth["now_shape"][segment]) == (colour, shape)
        assert truth["number"][-1] == len(story.events)
        assert (truth["number"].diff() >= 0).all()
        assert (truth["news"] == 1).sum() == len(set(segment_events(story, 100, 4).tolist()) - {-1})
        assert (truth["now_colour"][truth["news"] == 1] < len(COLOURS)).all()
        assert (truth["now_colour"][truth["news"] == 2] == len(COLOURS)).all()


def test_segment_motion_tells_actions_apart():
    """At the end of an event, what it does has changed most, and nothing else has; so the action follows from it."""
    axes = {"move left": (0, -1), "move right": (0, 1), "move up": (1, -1), "move down": (1, 1), "grow": (2, 1),
            "shrink": (2, -1), "turn": (3, 1), "appear": (4, 1), "leave": (4, -1), "blink": (5, 1)}  # fmt: skip
    seen = set()
    for index in range(30):
        story = make_story(story_seed("train", index))
        motion, events = segment_motion(story, 100, FRAMES), segment_events(story, 100, FRAMES)
        assert torch.equal(motion.isnan().all(-1), events < 0) and torch.equal(motion.isnan().any(-1), events < 0)
        for number, event in enumerate(story.events):
            pose, change = motion[events == number][-1].split([len(POSE), len(CHANGE)])
            axis, sign = axes[event.action]
            assert 0.5 < sign * change[axis] < 1.6, (event.action, change)
            assert torch.cat([change[:axis], change[axis + 1 :]]).abs().max() < 1e-6
            assert abs(pose[0] - event.x - event.dx) < 0.12 and abs(pose[1] - event.y - event.dy) < 0.12
            seen.add(event.action)
    assert len(seen) == len(axes)


def test_questions_point_at_the_event_that_holds_their_answer():
    pointed, counts = dict.fromkeys(KINDS, 0), set()
    for index in range(60):
        story = make_story(story_seed("train", index))
        for question in make_questions(story, per_kind=3):
            number, asked = event_of(question, story), question.template.split("/")[1]
            if number is None:
                assert question.kind in ("scene", "how many") or question.answer == "no"
                if question.kind == "how many":  # "in all" is read at the last event, others are counted
                    assert asked != "all" and NUMBERS[len(counted_in(question, story))] == question.answer
                    counts.add(question.answer)
                continue
            pointed[question.kind] += 1
            event = story.events[number]
            if question.kind in ("first", "last", "after"):
                assert getattr(event, asked) == question.answer
            elif question.kind == "before":
                assert getattr(story.events[number - 1], asked) == question.answer and number > 0
            elif question.kind == "what colour":
                assert event.colour == question.answer
            elif question.kind == "which action":
                assert event.action == question.answer
            elif question.kind == "when":
                quarter = ("first", "second", "third", "fourth").index(question.answer)
                assert quarter / 4 <= event.start / story.duration < event.end / story.duration <= (quarter + 1) / 4
            elif question.kind == "did it happen":
                assert all(word in question.question for word in (event.colour, event.shape))
    assert all(pointed[kind] > 20 for kind in KINDS if kind != "scene"), pointed
    assert counts == set(NUMBERS[:5])


def test_more_is_counted_than_the_benchmark_asks_for(parts):
    """Else the number is known by heart, of the one value of a story that is asked for."""
    answers = Counter()
    for index in range(40):
        story = make_story(story_seed("train", index))
        other = counting_more(story)
        asked = make_questions(other, kinds=["how many"], per_kind=16)
        assert all(NUMBERS[len(counted_in(one, story))] == one.answer for one in asked)
        assert len({one.question for one in asked}) == len(asked) >= 8
        assert len(set(other.counted) - set(story.counted)) >= 3
        answers.update(one.answer for one in asked)
    assert min(answers[number] for number in NUMBERS[:4]) > 20, answers
    _, processor, lessons = parts
    more = make_lesson(make_story(story_seed("train", 0)), lessons[12][0].local, lessons[12][0].global_,
                       PromptMaker(processor), num_frames=12, frames_per_segment=FRAMES, per_kind=2,
                       more_counts=16)  # fmt: skip
    before, after = (Counter(one.kind for one in lesson.questions) for lesson in (lessons[12][0], more))
    assert after.pop("how many") >= before.pop("how many") + 8
    assert before == after


def test_what_a_question_names_is_there_where_it_points(parts):
    """So the heads that read a question's end and a segment's end ask both for the same."""
    prompts, seen = PromptMaker(parts[1]), dict.fromkeys(("after", "before", "what colour"), 0)
    names = list(NAMED)
    for index in range(20):
        story = make_story(story_seed("train", index))
        truth = segment_truth(story, 100, FRAMES)
        there = truth[:, [list(HEADS).index(name) for name in names]]
        events = segment_events(story, 100, FRAMES)
        for asked in prompts.questions(make_questions(story, per_kind=3), story):
            assert len(asked.named) == len(names)
            if asked.kind not in seen:
                continue
            at_event = there[events == asked.event][-1].tolist()
            named = [i for i, name in enumerate(names) if asked.named[i] < NAMED[name] - 1]
            assert named and all(asked.named[i] == at_event[i] for i in named)
            seen[asked.kind] += 1
    assert min(seen.values()) > 20, seen


def test_pointing_and_counting_are_the_attention_that_the_model_really_pays(parts):
    model, processor, lessons = parts
    story_lessons, prompts = lessons[12], PromptMaker(processor)
    asked = [
        [*lesson.questions[:6], *(one for one in lesson.questions if one.kind == "how many")]
        for lesson in story_lessons
    ]
    batch = pack(story_lessons, asked, prompts)
    learner = LanguageWithHeads(model)
    results = learner(**batch)
    results["counting"].backward()
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    pointing, counting = [], []
    try:
        for row, lesson in enumerate(story_lessons):
            features = {"local_features": (lesson.local.float(),), "global_features": lesson.global_[None].float()}
            prefix = prompts.prefix(len(lesson.local) + len(lesson.global_))
            ends = batch["segment_ends"][row]
            latest = lesson.events.cummax(0).values
            for question in asked[row]:
                ids = torch.tensor([prefix + question.ids[: question.prompt_length]])
                with torch.no_grad():
                    attentions = model(input_ids=ids, video_features=features, output_attentions=True).attentions
                paid = attentions[LOOKING_LAYER][0, :, -1, : len(prefix)]  # at the prompt's end
                shares = paid / paid.sum(-1, keepdim=True)
                if question.event >= 0 and (there := lesson.events == question.event).any():
                    pointing.append(-shares[:LOOKING_HEADS, ends[there]].sum(-1).log())
                if question.kind == "how many":
                    counted = [i for i, hit in enumerate(question.counted) if hit == 1 and (latest == i).any()]
                    masses = [
                        shares[LOOKING_HEADS, 0],
                        *(shares[LOOKING_HEADS, ends[latest == i]].sum() for i in counted),
                    ]
                    equal = 1 / len(masses)
                    counting.append(sum(equal * (equal / mass).log() for mass in masses))
    finally:
        model.set_attn_implementation(before)
        model.zero_grad()
    assert len(pointing) >= 4 and len(counting) >= 3
    torch.testing.assert_close(results["pointing"].detach(), torch.stack(pointing).mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results["counting"].detach(), torch.stack(counting).mean(), rtol=1e-3, atol=1e-3)


def test_spread_positions_keep_order_and_segments_together(parts):
    _, processor, lessons = parts
    batches = iter(Lessons(lessons, PLAN, PromptMaker(processor), spread=1.0, max_position=300))
    largest = 0
    for _ in range(8):
        ((batch),) = next(batches)
        for positions, blocks in zip(batch["position_ids"], batch["blocks"], strict=True):
            video = positions[blocks == 0]
            assert (video.diff() >= 1).all()
            count = 12 // FRAMES * TOKENS
            first = len(video) - 1 - count  # bos, start, two global tokens come before the local ones
            starts = video[first : first + count : TOKENS]
            for start in range(first, first + count, TOKENS):
                assert (video[start : start + TOKENS].diff() == 1).all()
            # The middle of the video stays its middle: "in which quarter" has the same answer.
            assert starts.diff().max() - starts.diff().min() <= 1
            assert positions[blocks == 1][0] == video[-1] + 1
            largest = max(largest, int(video[-1]))
    assert 150 < largest <= 300 + len(video)


def test_lessons_have_labels_for_answers_alone(parts):
    _, processor, lessons = parts
    ((batch),) = next(iter(Lessons(lessons, PLAN, PromptMaker(processor), num_questions=6)))
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    for row, blocks in zip(labelled, batch["blocks"], strict=True):
        for block in range(1, int(blocks.max()) + 1):
            inside = row[blocks == block].nonzero().flatten()
            assert inside[-1] == (blocks == block).sum() - 1 and len(inside) >= 2
        assert not row[blocks == 0].any()
    assert set(np.unique(batch["kinds"])) <= {-1, *range(len(KINDS))}


def test_a_stage_that_is_done_is_not_trained_again(parts, tmp_path):
    model, processor, lessons = parts
    learner = LanguageWithHeads(model)
    options = {"num_questions": 3, "tokens_a_step": 24}
    before = model.lm_head.weight.detach().clone()
    train_language(learner, processor, lessons, PLAN, tmp_path, **options)
    trained = model.lm_head.weight.detach().clone()
    assert not torch.equal(before, trained)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    train_language(learner, processor, lessons, PLAN, tmp_path, **options)
    assert torch.equal(model.lm_head.weight, trained)


def test_truth_frames_are_those_of_the_renderer():
    item = next(iter(tiny_vision.TruthFrames(frames_per_story=8)))
    assert item["pixels"].shape == (8, 64, 64, 3) and item["pixels"].dtype == torch.uint8
    none = len(tiny_vision.SHAPES)
    for mask, shape, pose in zip(item["mask"], item["shape"], item["pose"], strict=True):
        assert bool(mask.any()) == bool(shape < none)
        if shape < none:
            ys, xs = mask.nonzero(as_tuple=True)
            assert abs(float(xs.float().mean() + 0.5) / 64 - pose[0]) < 0.06
            assert abs(float(ys.float().mean() + 0.5) / 64 - pose[1]) < 0.06


def test_training_goes_on_from_the_last_whole_checkpoint(tmp_path):
    for step in (3, 7):
        (tmp_path / f"checkpoint-{step}").mkdir()
    # As after a kill while the second was being written.
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert steps_done(tmp_path) == 3
