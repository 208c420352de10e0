"""What a pipeline can be called with: data sets, their columns, iterators, and videos with a question for all."""

import pytest
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from longvlm.modeling_longvlm.pipeline_inputs_longvlm import without_decoding
from tests.helpers.tiny_models import save_tiny_longvlm
from tests.helpers.video_files import write_video

datasets = pytest.importorskip("datasets")

QUESTIONS = ["A?", "Bb?", "Ccc?"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = save_tiny_longvlm(tmp_path_factory.mktemp("model"))
    return pipeline("video-question-answering", model=str(folder), max_new_tokens=5, min_new_tokens=5)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    where = tmp_path_factory.mktemp("films")
    return [write_video(where / f"{i}.mp4", range(i * 30, i * 30 + 20)) for i in range(3)]


@pytest.fixture(scope="module")
def expected(pipe, films):
    return [pipe(video=film, question=question) for film, question in zip(films, QUESTIONS, strict=True)]


def table(films, kind):
    rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "video": films, "question": QUESTIONS})
    if kind == "paths":
        return rows
    if kind == "bytes":
        rows = rows.map(lambda row: {"video": {"bytes": open(row["video"], "rb").read(), "path": None}})
    return rows.cast_column("video", datasets.Video(decode=kind == "decoded"))


@pytest.mark.parametrize("kind", ["paths", "column", "decoded", "bytes"])
def test_a_dataset_is_answered_row_by_row(pipe, films, expected, kind):
    rows = table(films, kind)
    answers = pipe(rows)
    assert len(answers) == 3 and list(answers) == expected
    assert list(pipe(rows, batch_size=2)) == expected
    assert list(pipe(rows.to_iterable_dataset())) == expected
    assert list(pipe(video=rows["video"], question=rows["question"])) == expected
    assert list(pipe(video=films, question=rows["question"])) == expected
    streamed = rows.to_iterable_dataset()
    assert list(pipe(video=streamed["video"], question=streamed["question"])) == expected
    assert next(iter(pipe(KeyDataset(rows, "video"), question="A?"))) == expected[0]
    assert next(iter(pipe(KeyDataset(rows, "question"), video=films[0]))) == expected[0]
    assert list(pipe(KeyDataset(rows, "video"), question=KeyDataset(rows, "question"), batch_size=3)) == expected
    if kind != "decoded":
        assert pipe(rows[0]) == expected[0] == pipe(rows[0]["video"], question="A?")
        assert pipe([rows[i] for i in range(3)]) == expected


def test_rows_may_have_windows_of_their_own(pipe, films):
    def frames(rows, **options):
        pipe.video_cache.clear()
        ends = []
        list(pipe(rows, progress=lambda stage, done, total: done == total and ends.append((stage, total)), **options))
        return [total for stage, total in ends if stage == "encode"]

    windows = {"video_start": [0.2, None, 0.4], "video_end": [0.6, 0.5, None]}
    rows = datasets.Dataset.from_dict({"video": films, "question": QUESTIONS, "fps": [25] * 3} | windows)
    assert frames(rows, num_frames=20) == [10, 13, 10]  # of 20, at 25 a second
    assert frames([rows[0]], num_frames=20, video_start=0.0, video_end=0.1) == [10]  # the row's own count
    with pytest.raises(ValueError, match="`video_start` 9 is past the end of the video"):
        pipe({"video": films[0], "question": "A?", "video_start": 9})


def test_iterators_are_read_as_they_are_answered(pipe, films, expected):
    read = []

    def rows():
        for film, question in zip(films, QUESTIONS, strict=True):
            read.append(film)
            yield {"video": film, "question": question}

    answers = iter(pipe(rows()))
    assert next(answers) == expected[0] and len(read) < 3
    assert list(answers) == expected[1:]
    assert list(pipe(map(dict, rows()))) == expected  # any iterator
    assert list(pipe(video=iter(films), question=iter(QUESTIONS))) == expected
    assert next(iter(pipe(video=(film for film in films), question="A?"))) == expected[0]
    assert list(pipe(video=films[0], question=iter(["A?"]))) == expected[:1]
    with pytest.raises(ValueError, match="the questions end after 2, the videos do not: give one"):
        list(pipe(video=iter(films), question=iter(QUESTIONS[:2])))
    with pytest.raises(ValueError, match="the videos end after 1, the questions do not"):
        list(pipe(video=iter(films[:1]), question=QUESTIONS))


def test_a_torch_dataset_is_a_dataset(pipe, films, expected):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"video": films[index], "question": QUESTIONS[index]}

    assert list(pipe(Rows())) == expected


def test_an_open_file_is_one_video(pipe, films, expected):
    with open(films[0], "rb") as file:
        assert pipe(video=file, question="A?") == expected[0]
    assert pipe(films[0], question="A?") == expected[0]


def test_columns_of_another_length_or_name_are_refused(pipe, films):
    rows = table(films, "column")
    with pytest.raises(ValueError, match="3 videos and 2 questions"):
        pipe(video=rows["video"], question=QUESTIONS[:2])
    with pytest.raises(ValueError, match='"video" and "question"'):
        list(pipe(rows.rename_column("video", "film")))
    with pytest.raises(ValueError, match="not both"):
        pipe(rows, question="A?")
    with pytest.raises(ValueError, match="not both"):
        pipe([rows[0]], question="A?")
    with pytest.raises(ValueError, match=r"got DatasetDict DatasetDict[^\n]*$"):
        pipe(datasets.DatasetDict({"test": rows}))
    with pytest.raises(ValueError, match="video is None"):
        list(pipe(datasets.Dataset.from_dict({"video": [None], "question": ["A?"]})))


def test_video_columns_are_not_decoded_by_datasets(films):
    rows = table(films, "decoded")
    assert rows.features["video"].decode and not without_decoding(rows).features["video"].decode
    for column in (without_decoding(rows["video"]), without_decoding(KeyDataset(rows, "video"))):
        assert column[1] == {"bytes": None, "path": films[1]}
    plain = table(films, "paths")
    assert without_decoding(plain) is plain and without_decoding(films) is films
    assert next(iter(without_decoding(rows.to_iterable_dataset())))["video"]["path"] == films[0]


def test_bytes_are_known_again_by_their_content(pipe, films):
    rows = table(films, "bytes")
    pipe.video_cache.clear()
    calls = []
    hook = pipe.model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(1))
    list(pipe(rows))
    list(pipe(rows))
    hook.remove()
    assert len(calls) == 3
