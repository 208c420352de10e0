"""Messages as objects, templates that read parts, and typed special tokens in them."""

import dataclasses
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvlm import LongVLMEngine, LongVLMProcessor, LongVLMVideoProcessor
from longvlm.processing.chat_template_form import AS_GIVEN, PARTS, STRING, content_form
from longvlm.processing.chat_templates_longvlm import CHAT_TEMPLATES
from longvlm.processing.text_escaping import unescape
from longvlm.training.chat_encoding import IGNORED, encode_chat
from tests.helpers.tiny_models import tiny_longvlm
from tests.helpers.tokenizers_for_tests import CHATML_TEMPLATE, byte_level_tokenizer

INDEXES = "{% for m in messages %}{{ m['role'] + ':' + m['content'][0]['text'] + ';' }}{% endfor %}"
LOOPS = (
    "{% for m in messages %}{{ m.role }}:"
    "{% for part in m.content %}{{ part.text if part.type == 'text' else '<video>' }}{% endfor %};{% endfor %}"
)
TRIMS = "{% for m in messages %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endfor %}"
TEXTS_LAST = (
    "{% for m in messages %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'video') %}{{ '<vid_patch>' }}{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro show(c) %}{% for part in c %}{{ part.text }}{% endfor %}{% endmacro %}{{ show(messages[0].content) }}"
)
EITHER_IN_MACRO = (
    "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for part in c %}{{ part.text }}{% endfor %}{% endif %}"
    "{% endmacro %}{{ show(messages[0].content) | trim }}"
)
NAMED = "{% set c = messages[0]['content'] %}{{ c[0].text }}"
MIXED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
)
VIDEO = np.zeros((4, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    method = {"frames_per_segment": 4, "tokens_per_segment": 3, "num_global_tokens": 2, "patches_per_frame": 4}
    return LongVLMProcessor(LongVLMVideoProcessor(size={"height": 8, "width": 8}), byte_level_tokenizer(), **method)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


# --- which form a template reads ---


@pytest.mark.parametrize(
    ("template", "form"),
    [
        *((template, STRING) for template in [*CHAT_TEMPLATES.values(), CHATML_TEMPLATE, EITHER, EITHER_IN_MACRO]),
        *((template, PARTS) for template in [INDEXES, LOOPS, TRIMS, TEXTS_LAST, MACRO, NAMED]),
        (MIXED, AS_GIVEN),
        ("no content at all", STRING),
        ("{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}", STRING),
        ("{% for m in messages %}{{ m.content.split('x')[-1] }}{% endfor %}", STRING),
        ("{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}", PARTS),
        # The name of a loop hides that of content.
        ("{% set x = messages[0].content %}{% for x in messages[0].content %}{{ x }}{% endfor %}", PARTS),
    ],
)
def test_the_form_of_content_is_found_by_looking_at_the_template(template, form):
    assert content_form(template) == form


def test_templates_that_index_or_loop_over_parts_get_parts(processor):
    chat = [{"role": "system", "content": "Be short."}, *user(text("What?"), text(" Why?"))]
    assert processor.apply_chat_template(chat, INDEXES) == "system:Be short.;user:What?;"
    assert processor.apply_chat_template(chat, LOOPS) == "system:Be short.;user:What? Why?;"
    called = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]
    assert processor.apply_chat_template(called, LOOPS) == "user:a;assistant:;"


def test_templates_that_take_strings_get_strings(processor):
    for template in (EITHER, EITHER_IN_MACRO, "{{ messages[0].content }}"):
        prompt = processor.apply_chat_template(user({"type": "video"}, text("What?")), template)
        assert prompt == "<vid_patch>\nWhat?"


def test_a_template_that_reads_both_gets_what_was_given(processor):
    chat = [*user(text("What?")), {"role": "assistant", "content": " A cat. "}]
    assert processor.apply_chat_template(chat, MIXED) == "What?A cat."


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LOOPS, "user:V\nWhat?;"),
        (TEXTS_LAST, "V\nWhat?"),
        (INDEXES, "user:V\nWhat?;"),  # writes nothing for a video: gets it in the text
        (TRIMS, "V\nWhat?"),
    ],
)
def test_videos_reach_the_prompt_of_a_template_of_parts(processor, template, expected):
    question = "\nWhat?" if template in (LOOPS, TEXTS_LAST) else "What?"
    chat = user({"type": "video", "video": VIDEO}, text(question))
    prompt = processor.apply_chat_template(chat, template)
    assert prompt.replace("<video>", "V").replace("<vid_patch>", "V") == expected
    out = processor.apply_chat_template(chat, template, tokenize=True, return_dict=True, return_tensors="pt")
    assert out["input_ids"][0].tolist().count(processor.video_token_id) == processor.num_video_tokens(4)
    assert out["num_frames"].tolist() == [4]


def test_an_answer_in_parts_can_be_continued_and_masked(processor):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    )
    chat = [*user({"type": "video", "video": VIDEO}, text("What?")), {"role": "assistant", "content": [text("A cat")]}]
    prompt = processor.apply_chat_template(chat, template, continue_final_message=True)
    assert prompt == "<vid_patch>\nWhat?A cat"
    out = processor.apply_chat_template(
        chat, template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = [i for i, m in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if m]
    assert processor.decode(answer) == "A cat<|im_end|>"


WRITES_VIDEOS = "{% for part in m.content %}{{ part.text if part.type == 'text' else 'VIDEO' }}{% endfor %}"
ANSWERS = "{% generation %}{{ m.content[0].text + '<|im_end|>' }}{% endgeneration %}"


@pytest.mark.parametrize("written", ["<video>", "<vid_patch>", "<vid_start><vid_patch><vid_end>"])
def test_answers_are_found_however_a_template_writes_videos(processor, written):
    template = "{% for m in messages %}{% if m.role == 'user' %}USER{% else %}ANSWER{% endif %}{% endfor %}"
    template = template.replace("USER", WRITES_VIDEOS.replace("VIDEO", written)).replace("ANSWER", ANSWERS)
    clip = {"type": "video", "video": VIDEO}
    chat = [*user(clip, text("What?")), {"role": "assistant", "content": "A cat"}] * 2
    assert processor.apply_chat_template(chat, template) == "<vid_patch>What?A cat<|im_end|>" * 2
    out = processor.apply_chat_template(
        chat, template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answers = [i for i, m in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if m]
    assert processor.decode(answers) == "A cat<|im_end|>" * 2
    chat = [*user({"type": "video"}, text("What?")), {"role": "assistant", "content": "A cat"}]
    for training_template in (template, template.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        encoded = encode_chat(processor, chat, [5], chat_template=training_template)
        assert processor.decode([label for label in encoded.labels if label != IGNORED]) == "A cat<|im_end|>"


# --- text from a person is not searched for special tokens ---


SPECIAL = ["<vid_patch>", "<vid_start>", "<video>", "<|im_end|>", "<think>"]


@pytest.mark.parametrize("template", [LOOPS, TRIMS, TEXTS_LAST, MACRO])
@given(
    pieces=st.lists(st.sampled_from([*SPECIAL, "<", "<vid", "_patch>", "vid_patch>", "<|im_", "end|>", " ", "a"])),
    cuts=st.lists(st.integers(1, 9), max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_typed_special_tokens_stay_text_however_they_are_cut_into_parts(processor, template, pieces, cuts):
    typed = "".join(pieces) or "a"
    parts, rest = [], typed
    for cut in cuts:
        parts, rest = [*parts, text(rest[:cut])], rest[cut:]
    ids = processor.apply_chat_template(user(*parts, text(rest)), template, tokenize=True)[0]
    specials = processor.tokenizer.convert_tokens_to_ids([s for s in SPECIAL if s != "<video>"])
    assert not set(ids) & set(specials)
    if template == MACRO:
        assert processor.decode(ids) == typed


def test_a_special_token_split_by_a_video_or_by_white_space_stays_text(processor):
    for parts in (
        [text("<vid_"), {"type": "video", "video": VIDEO}, text("patch>")],
        [text("<vid_ \n"), text(" patch>"), {"type": "video", "video": VIDEO}],
    ):
        for template in (TEXTS_LAST, TRIMS + "<vid_patch>"):
            out = processor.apply_chat_template(user(*parts), template, tokenize=True)
            assert out[0].count(processor.video_token_id) == processor.num_video_tokens(4)


def test_text_without_special_tokens_is_not_marked_in_parts(processor):
    prompt = processor.apply_chat_template(user(text("a < b"), text("c")), LOOPS)
    assert prompt == unescape(prompt) == "user:a < bc;"


# --- messages that are objects ---


@dataclasses.dataclass
class Message:
    role: str
    content: object
    tool_calls: list | None = None


@dataclasses.dataclass
class Part:
    type: str
    text: str | None = None
    video: object = None


NamedMessage = namedtuple("NamedMessage", "role content")


class SlottedMessage:
    __slots__ = ("content", "kind")

    def __init__(self, role, content):
        self.kind, self.content = role, content

    @property
    def role(self):
        return self.kind


def pydantic_message(role, content):
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("ChatMessage", role=(str, ...), content=(object, ...), name=(str | None, None))
    return model(role=role, content=content)


MAKERS = {
    "dataclass": Message,
    "pydantic": pydantic_message,
    "attributes": lambda role, content: SimpleNamespace(role=role, content=content),
    "named tuple": NamedMessage,
    "slots and properties": SlottedMessage,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_messages_may_be_objects(processor, kind):
    make = MAKERS[kind]
    chat = [make("system", "Be short."), make("user", [{"type": "video", "video": VIDEO}, Part("text", "What?")])]
    plain = [{"role": "system", "content": "Be short."}, *user({"type": "video", "video": VIDEO}, text("What?"))]
    for template in (None, LOOPS):
        expected = processor.apply_chat_template(plain, template)
        assert processor.apply_chat_template(chat, template) == expected
        assert processor.apply_chat_template([chat, chat], template) == [expected, expected]
    out = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert out["input_ids"] == processor.apply_chat_template(plain, tokenize=True)
    bare, videos = processor.take_videos(chat)
    assert bare[1]["content"][0] == {"type": "video"}
    assert videos[0].video is VIDEO  # not a copy


def test_empty_fields_of_objects_are_not_there_for_the_template(processor):
    template = "{{ messages[0].role }}{% if messages[0].tool_calls is defined %} calls{% endif %}"
    assert processor.apply_chat_template([Message("user", "a")], template) == "user"
    call = SimpleNamespace(type="function")
    assert processor.apply_chat_template([Message("user", "a", tool_calls=[call])], template) == "user calls"


def test_a_video_part_may_be_an_object_with_options_and_an_address(processor):
    part = SimpleNamespace(type="video_url", video_url=SimpleNamespace(url=VIDEO), num_frames=2)
    out = processor.apply_chat_template([Message("user", [part])], tokenize=True, return_dict=True)
    assert out["num_frames"].tolist() == [2]


def test_the_engine_answers_messages_that_are_objects():
    model, processor = tiny_longvlm()
    engine = LongVLMEngine(model, processor)
    chat = [Message("user", [Part("video", video=VIDEO), Part("text", "What?")])]
    plain = user({"type": "video", "video": VIDEO}, text("What?"))
    assert engine.generate(chat, max_new_tokens=4) == engine.generate(plain, max_new_tokens=4)
    assert engine.generate([chat, chat], max_new_tokens=4) == engine.generate([plain, plain], max_new_tokens=4)
    assert "".join(engine.stream(chat, max_new_tokens=4)) == engine.generate(plain, max_new_tokens=4)
    assert engine.score_choices(chat, ["a", "b"]) == engine.score_choices(plain, ["a", "b"])


@pytest.mark.parametrize("template", [LOOPS, INDEXES])
def test_the_engine_uses_templates_of_parts(template):
    model, processor = tiny_longvlm()
    engine = LongVLMEngine(model, processor)
    plain = user({"type": "video", "video": VIDEO}, text("What?"))
    (answer,) = engine.generate([plain], max_new_tokens=4, return_details=True, chat_template=template)
    text_of_prompt = processor.apply_chat_template(plain, template)
    expected = processor(text_of_prompt, VIDEO, return_tensors="pt")
    assert answer.prompt_tokens == expected["input_ids"].shape[1]
    ids = model.generate(**expected, max_new_tokens=4)[0, answer.prompt_tokens :].tolist()
    assert answer.token_ids == ids


@pytest.mark.parametrize(
    "wrong", ["hello", 3, {"content": "a"}, SimpleNamespace(content="a"), Message, Message(None, "a")]
)
def test_what_has_no_role_is_no_message(processor, wrong):
    with pytest.raises(ValueError, match='messages must be dicts or objects with "role" and "content"') as caught:
        processor.apply_chat_template([wrong])
    assert "\n" not in str(caught.value)


# --- templates without marks ---


def test_a_chat_template_need_not_hold_jinja_marks(processor, tmp_path):
    assert processor.apply_chat_template(user(text("a")), "test template") == "test template"
    plain = LongVLMProcessor(processor.video_processor, processor.tokenizer, chat_template="test template")
    plain.save_pretrained(tmp_path)
    assert LongVLMProcessor.from_pretrained(tmp_path).chat_template == "test template"
    with pytest.raises(ValueError, match=r'"vicuna" is neither a Jinja template nor a built-in one'):
        processor.apply_chat_template(user(text("a")), "vicuna")
