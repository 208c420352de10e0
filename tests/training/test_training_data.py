"""Training data: forms of rows, the report of what is dropped, labels equal to the released code's, batches."""

import json
import pickle

import pytest
import torch
from PIL import Image

from longvlm.features.store import FeatureWriter
from longvlm.training.chat_encoding import encode_chat
from longvlm.training.collator import LongVLMDataCollator
from longvlm.training.data import build_dataset
from longvlm.training.formats import as_messages
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_models import tiny_config, tiny_processor
from tests.helpers.tokenizers_for_tests import byte_level_tokenizer, original_tokenizer, unigram_tokenizer
from tests.helpers.video_files import write_video

GOLDEN = json.loads((FIXTURES / "labels.json").read_text())
VIDEOINSTRUCT = json.loads((FIXTURES / "prompts.json").read_text())["videoinstruct"]
# SmolLM2's, without the sentence about itself: no generation marks, a system text of its own.
PLAIN_CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: the last answer gets an empty thought that an opened turn does not have, and answers are stripped.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nHm' }}{% endif %}"
)
TOKENIZERS = {
    "byte level": lambda template: byte_level_tokenizer(template),
    "byte level with a space in front": lambda template: byte_level_tokenizer(template, add_prefix_space=True),
    "SentencePiece unigram": lambda template: _with(unigram_tokenizer(), template),
    "SentencePiece BPE": lambda template: _with(original_tokenizer(), template),
}
CHAT = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Was sieht man? 日本語"}]},
    {"role": "assistant", "content": "Ein Café - 犬が走る 🐕."},
    {"role": "user", "content": "Is <|im_end|> or </s> or <video> in it?"},
    {"role": "assistant", "content": "No </s> is\nin it, nor <vid_patch>."},
]


def _with(tokenizer, template):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def processor_for(tokenizer):
    return tiny_processor(tiny_config(), tokenizer=tokenizer)


def supervised_texts(processor, chat):
    """What the labels say, run by run."""
    runs, last = [], None
    for position, label in enumerate(chat.labels):
        if label == -100:
            continue
        assert label == chat.input_ids[position]
        if last == position - 1:
            runs[-1].append(label)
        else:
            runs.append([label])
        last = position
    return [processor.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("marked", [True, False], ids=["generation marks", "prefixes"])
def test_labels_are_those_of_the_released_code(case, marked):
    processor = processor_for(original_tokenizer())
    if not marked:
        words = ("{%- generation -%}", "{%- endgeneration -%}")
        for word in words:
            assert word in processor.chat_template
            processor.chat_template = processor.chat_template.replace(word, "")
    row = {"conversations": case["conversations"], "video": "v.mp4"}
    if not case["num_video_tokens"]:
        del row["video"]
    if not case["answer_spans"]:
        with pytest.raises(ValueError, match="the assistant says nothing"):
            as_messages(row)
        return
    messages = as_messages(row)
    counts = [case["num_video_tokens"]] * bool(case["num_video_tokens"])
    chat = encode_chat(processor, messages, counts)
    # A token counts if it lies in [start - 1, end): the space before an answer is in its first token.
    encoded = processor.tokenizer(case["prompt"], return_offsets_mapping=True)
    assert chat.input_ids == encoded["input_ids"]
    inside = [
        any(a < end and b > start - 1 for start, end in case["answer_spans"]) and b > a
        for a, b in encoded["offset_mapping"]
    ]
    expected = [token if said else -100 for token, said in zip(encoded["input_ids"], inside, strict=True)]
    assert chat.labels == expected


@pytest.mark.parametrize("template", [PLAIN_CHATML, THINKING, None], ids=["ChatML", "thinking", "Vicuna"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_loss_is_on_answers_and_their_end_token_only(name, template):
    processor = processor_for(TOKENIZERS[name](template))
    chat = encode_chat(processor, CHAT, [8])
    assert chat.input_ids.count(processor.video_token_id) == 8
    end = processor.tokenizer.eos_token if template is None else "<|im_end|>"
    texts = supervised_texts(processor, chat)
    wanted = ["Ein Café - 犬が走る 🐕." + end, "No </s> is\nin it, nor <vid_patch>." + end]
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in wanted]


def test_marks_of_a_template_and_prefixes_give_the_same_labels():
    from tests.helpers.tokenizers_for_tests import CHATML_TEMPLATE

    plain = CHATML_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    marked = encode_chat(processor_for(byte_level_tokenizer(CHATML_TEMPLATE)), CHAT, [8])
    assert encode_chat(processor_for(byte_level_tokenizer(plain)), CHAT, [8]) == marked


def test_rows_of_videoinstruct_alternate_as_in_the_released_code():
    for number, (row, converted) in enumerate(
        zip(VIDEOINSTRUCT["input"], VIDEOINSTRUCT["converted_plain"], strict=True)
    ):
        assert as_messages(row, number) == as_messages({**converted, "video": row["video_id"]})


def test_all_forms_of_a_row_become_the_same_chat():
    chat = [
        {"role": "user", "content": [{"type": "video", "video": "v"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A man."},
    ]
    turns = [{"from": "human", "value": "<video>\nWho?"}, {"from": "gpt", "value": "A man."}]
    trl = [{"role": "user", "content": "<video>\nWho?"}, {"role": "assistant", "content": "A man."}]
    rows = [
        {"video_id": "v", "q": "Who?", "a": "A man."},
        {"video": "v", "conversations": turns},
        {"messages": chat},
        {"messages": trl, "videos": ["v"]},
        {"video": "v", "question": "Who?", "answer": "A man."},
    ]
    for row in rows:
        assert as_messages(row, 1) == chat
    # What a person wrote in a chat without videos stays text.
    assert as_messages({"messages": trl}) == trl


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "long.mp4", 24)
    write_video(folder / "short.mp4", 3)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder


def test_every_dropped_row_is_named_with_its_reason(videos, tmp_path):
    lines = [
        {"video_id": "long", "q": "Who?", "a": "A man."},
        {"video_id": "missing", "q": "Who?", "a": "A man."},
        {"video_id": "broken", "q": "Who?", "a": "A man."},
        {"video_id": "short", "q": "Who?", "a": " "},
        {"video_id": "short", "q": "Who?", "a": "A man. " * 100},
        {"video": "long.mp4", "conversations": [{"from": "human", "value": "Hm"}, {"from": "gpt", "value": "Yes"}]},
        {"q": "Two and two?", "a": "Four."},
        {"whatever": 1},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"video_id": 12345, "q": "Who?", "a": "A man."},
        {"video": {"file": "long.mp4"}, "question": "Who?", "answer": "A man."},
    ]
    text = "\n".join(json.dumps(line) for line in lines[:3]) + "\n{oops\n\n"
    (tmp_path / "rows.jsonl").write_text(text + "\n".join(json.dumps(line) for line in lines[3:]))
    processor = processor_for(byte_level_tokenizer())
    dataset, report = build_dataset([tmp_path / "rows.jsonl"], processor, video_folders=[videos], max_length=300)
    assert [chat.where for chat in dataset.chats] == ["rows.jsonl, line 1", "rows.jsonl, line 9"]
    assert {(row.where.split()[-1], row.kind) for row in report.dropped} == {
        ("2", "missing video"),
        ("3", "broken video"),
        ("4", "bad line"),
        ("6", "no answer"),
        ("7", "too long"),
        ("8", "videos and places differ"),
        ("10", "unknown form"),
        ("11", "unknown role"),
        ("12", "unknown role"),
        ("13", "missing video"),
        ("14", "broken video"),
    }
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["kept"] == 2 and '"missing" is not in' in saved["dropped"][0]["reason"]
    assert str(report).startswith("2 rows kept, 11 dropped: ")
    with pytest.raises(ValueError, match="no row is left to train on"):
        build_dataset([[{"q": "Who?", "a": ""}]], processor)


def test_no_row_stops_the_others(videos, tmp_path):
    """Each of these ended the whole run once."""
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "frames" / "1.png")  # images have no frame rate
    rows = [
        {"video": "long.mp4", "question": "Who?", "answer": "A man."},
        {"video": "frames", "question": "Who?", "answer": "A man."},
        {"video": "data:video/mp4;base64," + "A" * 5000, "question": "Who?", "answer": "A man."},
        {"messages": [{"role": "user", "content": "Who?"}] * 2 + [{"role": "assistant", "content": "A man."}]},
    ]
    alternating = (
        "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    )
    dataset, report = build_dataset(
        [rows], processor_for(byte_level_tokenizer()), video_folders=[videos, tmp_path], video_options={"fps": 1.0},
        chat_template=alternating,
    )  # fmt: skip
    assert len(dataset.chats) == 1
    kinds = [row.kind for row in report.dropped]
    assert kinds == ["broken video", "broken video", "refused by the chat template"]
    assert "roles must alternate" in report.dropped[2].reason
    with pytest.raises(ValueError, match="`fps` is -1"):  # the fault of the options, not of a row
        build_dataset(
            [rows], processor_for(byte_level_tokenizer()), video_folders=[videos], video_options={"fps": -1.0}
        )


def test_options_of_a_rows_videos_count(tmp_path):
    write_video(tmp_path / "v.mp4", 50)  # 2 seconds

    def row(**options):
        content = [{"type": "video", "video": "v.mp4", **options}, {"type": "text", "text": "Who?"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A man."}]}

    rows = [
        row(),
        row(num_frames=3, fps=None),
        row(fps=10, video_start=1),
        row(video_start=1, video_end=1.2),
        row(video_start=9),
        row(max_pixels=9),
    ]
    processor = processor_for(byte_level_tokenizer())
    dataset, report = build_dataset([rows], processor, video_folders=[tmp_path])
    assert [row.kind for row in report.dropped] == ["broken video", "unknown option"]
    assert "`video_start` 9 is past the end" in report.dropped[0].reason and "max_pixels" in report.dropped[1].reason
    batch = LongVLMDataCollator(processor)([dataset[i] for i in range(len(dataset))])
    assert batch["num_frames"].tolist() == [8, 3, 10, 5]
    assert batch["attention_mask"].sum(1).tolist() == dataset.lengths
    window = {"video_start": 1.5, "num_frames": 4}
    dataset, _ = build_dataset([rows[:3]], processor, video_folders=[tmp_path], video_options=window)
    batch = LongVLMDataCollator(processor, video_options=window)([dataset[i] for i in range(3)])
    assert batch["num_frames"].tolist() == [4, 3, 10]


@pytest.mark.parametrize("kind", ["paths", "bytes", "decoded"])
def test_videos_of_a_video_column(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    paths = [write_video(tmp_path / f"{i}.mp4", range(i * 30, i * 30 + 20 + 5 * i)) for i in range(3)]
    rows = {"video": paths, "question": ["Who?"] * 3, "answer": ["A man."] * 3}
    processor = processor_for(byte_level_tokenizer())
    collator = LongVLMDataCollator(processor, video_options={"fps": 10})
    expected, _ = build_dataset([datasets.Dataset.from_dict(rows)], processor, video_options={"fps": 10})
    expected = collator([expected[i] for i in range(3)])
    if kind == "bytes":
        rows["video"] = [{"bytes": open(path, "rb").read(), "path": None} for path in paths[:2]]
        rows["video"].append({"bytes": b"no video", "path": "broken.mp4"})
    table = datasets.Dataset.from_dict(rows).cast_column("video", datasets.Video(decode=kind == "decoded"))
    for source in (table, [table[i] for i in range(3)] if kind == "bytes" else table):
        dataset, report = build_dataset([source], processor, video_options={"fps": 10})
        assert len(dataset) == (2 if kind == "bytes" else 3)
        for dropped in report.dropped:
            assert dropped.kind == "broken video" and dropped.reason.startswith("broken.mp4: not a video file")
        batch = collator([pickle.loads(pickle.dumps(dataset))[i] for i in range(len(dataset))])
        assert batch["num_frames"].tolist() == [8, 10, 12][: len(dataset)]
        frames = int(batch["num_frames"].max())
        assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"][: len(dataset), :frames])
    if kind == "bytes":  # which stay in the table until they are needed
        dataset, _ = build_dataset([table], processor)
        assert len(pickle.dumps(dataset.chats[0].messages, 5)) - len(pickle.dumps(table, 5)) < 1000
    else:
        collated = collator([{"video": {"bytes": None, "path": paths[0]}, "question": "Who?", "answer": "Me."}])
        assert collated["num_frames"].tolist() == [8]


def test_a_video_column_names_files_in_the_video_folders_and_features(tmp_path):
    write_video(tmp_path / "v.mp4", 20)
    rows = [{"video": {"bytes": None, "path": "v.mp4"}, "question": "Who?", "answer": "A man."}]
    rows += [{"video": {"bytes": None, "path": None}, "question": "Who?", "answer": "A man."}]
    processor = processor_for(byte_level_tokenizer())
    dataset, report = build_dataset([rows], processor, video_folders=[tmp_path])
    assert len(dataset) == 1 and "neither bytes nor a path" in report.dropped[0].reason
    with FeatureWriter(tmp_path / "features", num_global_layers=2) as writer:
        writer.add("v", torch.zeros(5, 8), torch.zeros(2, 8))
    rows[1]["video"] = {"bytes": b"not opened", "path": "v.mp4"}
    dataset, _ = build_dataset([rows], processor, features=[tmp_path / "features"])
    assert [chat.features for chat in dataset.chats] == [((0, "v"),)] * 2 and "video_features" in dataset[1]


def test_features_of_a_window_are_found_by_its_times(tmp_path):
    names = ("v", "v@0-30", "v@30-60.5", "v@60.5-")
    with FeatureWriter(tmp_path, num_global_layers=2) as writer:
        for length, name in enumerate(names, start=1):
            writer.add(name, torch.zeros(length, 8), torch.zeros(2, 8))

    def row(**options):
        content = [{"type": "video", "video": "v.mp4", **options}, {"type": "text", "text": "Who?"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A man."}]}

    windows = [{}, {"video_end": 30}, {"video_start": 30.0, "video_end": 60.5}, {"video_start": 60.5}]
    rows = [row(**window) for window in windows] + [row(video_start=2), row(num_frames=3)]
    processor = processor_for(byte_level_tokenizer())
    dataset, report = build_dataset([rows], processor, features=[tmp_path])
    assert [chat.features[0][1] for chat in dataset.chats] == list(names)
    assert 'no features of the video "v.mp4@2-"' in report.dropped[0].reason
    assert "num_frames of a video cannot be applied to extracted features" in report.dropped[1].reason
    dataset, _ = build_dataset([rows[:1]], processor, features=[tmp_path], video_options={"video_end": 30})
    assert dataset.chats[0].features[0][1] == "v@0-30"


def test_features_of_another_video_of_that_name_are_not_taken(tmp_path):
    with FeatureWriter(tmp_path, num_global_layers=2) as writer:
        for name in ("v_0", "v_1", "more/v_2"):
            writer.add(name, torch.zeros(4, 16), torch.zeros(2, 16))
    (tmp_path / "failed.jsonl").write_text(json.dumps({"video": "other/v_1", "reason": "it is cut"}) + "\n")
    with FeatureWriter(tmp_path / "again", num_global_layers=2) as writer:
        writer.add("other/v_3", torch.zeros(4, 16), torch.zeros(2, 16))
    (tmp_path / "again" / "failed.jsonl").write_text(json.dumps({"video": "v_0", "reason": "it is cut"}) + "\n")
    names = [
        "v_0",
        "/at/videos/v_0.mp4",
        "videos/more/v_2.mp4",
        "more/v_0",
        "videos/other/v_1.mp4",
        "other/v_3.avi",
        "/",
    ]
    rows = [{"video": name, "question": "Who?", "answer": "A man."} for name in names]
    dataset, report = build_dataset(
        [rows], processor_for(byte_level_tokenizer()), features=[tmp_path, tmp_path / "again"]
    )
    found = [chat.features for chat in dataset.chats]
    assert found == [((0, "v_0"),), ((0, "v_0"),), ((0, "more/v_2"),), ((1, "other/v_3"),)]
    assert '"more/v_0" in' in report.dropped[0].reason
    assert "could not be extracted: it is cut" in report.dropped[1].reason
    assert 'no features of the video "/"' in report.dropped[2].reason


def test_json_parquet_and_datasets_give_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"q": f"Question {i}?", "a": f"Answer {i}."} for i in range(4)]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    processor = processor_for(byte_level_tokenizer())
    sources = [tmp_path / "rows.json", tmp_path / "rows.parquet", tmp_path / "saved", table]
    chats = [[c.messages for c in build_dataset([source], processor)[0].chats] for source in sources]
    assert len(chats[0]) == 4 and all(chat == chats[0] for chat in chats)


def test_progress_counts_the_rows_of_each_source_dropped_ones_too(tmp_path):
    rows = [{"q": "Who?", "a": "Yes."}, {"whatever": 1}, {"q": "What?", "a": "No."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n{oops\n")
    calls = []
    build_dataset(
        [tmp_path / "rows.jsonl", rows, (row for row in rows)],  # the last one's length is not known
        processor_for(byte_level_tokenizer()),
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("check rows", done, total) for total in (4, 3) for done in range(1, total + 1)]


def test_weights_repeat_and_thin_out_files():
    processor = processor_for(byte_level_tokenizer())
    one, two = ([{"q": f"{name} {i}?", "a": "Yes."} for i in range(6)] for name in "ab")
    dataset, report = build_dataset([one, two], processor, weights=[2, 0.5])
    questions = [chat.messages[0]["content"] for chat in dataset.chats]
    assert report.kept == 12
    assert all(questions.count(f"a {i}?") == 2 for i in range(6))
    assert len({q for q in questions if q.startswith("b")}) == 3 == len(questions) - 12


def test_truncation_cuts_the_end_and_never_a_video():
    processor = processor_for(original_tokenizer())
    whole = encode_chat(processor, CHAT, [8])
    cut = encode_chat(processor, CHAT, [8], max_length=len(whole) - 3, truncation=True)
    assert cut.input_ids == whole.input_ids[:-3] and cut.labels == whole.labels[:-3]
    video_last = [
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "video"}]},
        {"role": "assistant", "content": "A man."},
    ]
    whole = encode_chat(processor, video_last, [30])
    last = max(i for i, token in enumerate(whole.input_ids) if token == processor.video_token_id)
    for limit, reason in ((last, "would cut a video"), (last + 3, "nothing of the answers")):
        with pytest.raises(ValueError, match=reason):
            encode_chat(processor, video_last, [30], max_length=limit, truncation=True)


def test_a_batch_is_padded_on_the_right_and_has_its_videos(videos):
    processor = processor_for(byte_level_tokenizer())
    rows = [
        {"video_id": str(videos / "long.mp4"), "q": "Who?", "a": "A man."},
        {"q": "Two and two?", "a": "Four."},
        {"video_id": str(videos / "short.mp4"), "q": "Who comes in then, and why?", "a": "A man with a dog."},
    ]
    collator = LongVLMDataCollator(processor, pad_to_multiple_of=8)
    batch = collator(rows)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["num_frames"].tolist() == [8, 3]
    assert batch["pixel_values_videos"].shape[:2] == (2, 8)
    counts = (batch["input_ids"] == processor.video_token_id).sum(1).tolist()
    assert counts == [processor.num_video_tokens(8), 0, processor.num_video_tokens(3)]
    for row, mask in enumerate(batch["attention_mask"]):
        length = int(mask.sum())
        assert mask[:length].all() and (batch["labels"][row, length:] == -100).all()
        alone = collator([rows[row]])
        assert torch.equal(alone["labels"][0, :length], batch["labels"][row, :length])
    assert "pixel_values_videos" not in collator(rows[1:2])
    # The processor still pads as generation needs it.
    assert processor.tokenizer.padding_side == "left"


def test_too_long_a_row_in_the_collator_is_told_in_one_line():
    processor = processor_for(byte_level_tokenizer())
    with pytest.raises(ValueError, match=r"row 0 of a batch cannot be trained on: .* `max_length` is 5"):
        LongVLMDataCollator(processor, max_length=5)([{"q": "Two and two?", "a": "Four."}])
