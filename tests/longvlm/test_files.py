"""JSON files of checkpoints that hold something else end in one line that names the file."""

import pytest

from longvlm.conversion.llava import convert_llava
from longvlm.conversion.to_original import convert_to_original
from longvlm.files import read_json_object
from longvlm.publishing.model_card import read_config

WRONG = {"a list": b"[]", "text": b'"x"', "no JSON": b"{", "not UTF-8": b"\xff\xfe\x00", "empty": b""}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_object_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    calls = {
        "read": lambda: read_json_object(file),
        "publish": lambda: read_config(tmp_path),
        "llava": lambda: convert_llava(tmp_path, tmp_path / "out"),
        "to-original": lambda: convert_to_original(tmp_path, tmp_path / "out"),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"config\.json") as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_fields_that_lack_are_no_traceback(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "longvlm"}')
    with pytest.raises(ValueError, match="language model"):
        convert_to_original(tmp_path, tmp_path / "out")
