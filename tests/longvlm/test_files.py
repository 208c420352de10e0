"""Files are written whole or not at all; JSON and YAML of something else end in one line that names the file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longvlm.conversion.llava import convert_llava
from longvlm.conversion.to_original import convert_to_original
from longvlm.files import atomic_write, check_free, output_folder, parse_yaml, read_json, read_json_object
from longvlm.publishing.model_card import read_config

WRONG = {
    "a list": b"[]",
    "text": b'"x"',
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe\x00",
    "empty": b"",
    "nested too deeply": b"[" * 10**5,
    "an object nested too deeply": b'{"a": ' * 10**5 + b"1" + b"}" * 10**5,
    "a number of too many digits": b'{"model_type": "longvlm", "x": ' + b"9" * 5000 + b"}",
    "NUL": b"\0" * 100,
    "a mark of UTF-8": b"\xef\xbb\xbf{}",  # transformers does not read it either
    "UTF-16": "{}".encode("utf-16"),
}


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


def test_missing_fields_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "longvlm"}')
    with pytest.raises(ValueError, match="language model"):
        convert_to_original(tmp_path, tmp_path / "out")


def test_a_file_appears_whole(tmp_path):
    out = tmp_path / "new" / "numbers.json"
    with atomic_write(out) as partial:
        partial.write_text("[1")
        assert partial.suffix == ".json" and not out.exists()
        partial.write_text("[1]")
    assert out.read_text() == "[1]" and list(out.parent.iterdir()) == [out]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_error_changes_nothing(tmp_path):
    out = tmp_path / "numbers.json"
    out.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(out) as partial:
        partial.write_text("after")
        1 / 0  # noqa: B018
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_write(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    out = tmp_path / "numbers.json"
    script = (
        "import os, sys, longvlm.files as f\n"
        "with f.atomic_write(sys.argv[1]) as partial:\n    partial.write_text('half')\n    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(out)]).returncode == 9
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with atomic_write(out) as partial:
        assert list(tmp_path.iterdir()) == []
        partial.write_text("whole")
    assert list(tmp_path.iterdir()) == [out]


def test_two_writers_at_once_do_not_meet(tmp_path):
    out = tmp_path / "numbers.json"
    with atomic_write(out) as first, atomic_write(out) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert out.read_text() == "first" and list(tmp_path.iterdir()) == [out]


def test_what_another_machine_writes_to_a_shared_disk_stays(tmp_path):
    """Its process ids mean nothing here."""
    other = tmp_path / ".numbers.json.partial-999999999.othermachine.0.json"
    other.write_text("half")
    with atomic_write(tmp_path / "numbers.json") as partial:
        partial.write_text("whole")
    assert other.read_text() == "half"


def test_files_behind_links_keep_their_modes(tmp_path):
    (tmp_path / "secret.txt").touch(0o600)
    with output_folder(tmp_path / "out") as folder:
        (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert (tmp_path / "secret.txt").stat().st_mode & 0o777 == 0o600


def test_folders_that_must_not_be_replaced_are_refused(tmp_path, monkeypatch):
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "precious.txt").touch()
    monkeypatch.chdir(tmp_path / "project" / "src")
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    for out, reason in (("..", "current folder"), (str(tmp_path), "current folder"), ("/proc", "mount point")):
        with pytest.raises(ValueError, match=reason):
            check_free(out, overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="home folder"):
        check_free(tmp_path / "project", overwrite=True)
    assert (tmp_path / "project" / "precious.txt").exists()


def test_an_interruption_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "precious.txt").write_text("keep")

    def interrupted(self, target):
        renamed = rename(self, target)
        if "previous" in str(target):
            raise SystemExit(143)  # what SIGTERM becomes in the commands
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit), output_folder(out, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert [file.name for file in tmp_path.rglob("*.txt")] == ["precious.txt"] and (out / "precious.txt").exists()


def test_a_folder_that_was_lost_between_two_renames_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    script = (
        "import os, sys, pathlib, longvlm.files as f\n"
        "rename = pathlib.Path.rename\n"
        "pathlib.Path.rename = lambda a, b: (rename(a, b), os._exit(9))\n"
        "with f.output_folder(sys.argv[1], overwrite=True) as folder:\n    (folder / 'new.txt').touch()"
    )
    out.mkdir()
    (out / "precious.txt").touch()
    assert subprocess.run([sys.executable, "-c", script, str(out)]).returncode == 9
    assert not out.exists()
    with pytest.raises(ValueError, match="not empty"), output_folder(out):
        pass
    assert (out / "precious.txt").exists()


def test_the_current_folder_is_not_replaced_even_if_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="current folder"), output_folder("."):
        pass
    assert Path.cwd() == tmp_path


def test_files_of_users_may_have_any_unicode_encoding(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "rows.json").write_text('["größer"]', encoding=encoding)
        assert read_json(tmp_path / "rows.json") == ["größer"]


BAD_YAML = {
    "nested too deeply": (b"[" * 50_000, "nested too deeply to be read as YAML"),
    "a mapping nested too deeply": (b"{a: " * 50_000, "nested too deeply to be read as YAML"),
    "a bomb": (
        b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("k"))),
        "aliases that make more than 100,000 values; write them out",
    ),
    "an alias of itself": (b"a: &a [1, *a]", "an alias stands within what it names"),
    "a tag that makes an object": (b"a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "a tag of its own": (b"a: !include /etc/passwd", "could not determine a constructor"),
    "a key twice": (b"a: 1\nb: 2\na: 3", "'a' is there 2 times; leave the others out"),
    "a date that cannot be": (b"a: 2026-99-99", "is not YAML: month must be in 1..12"),
    "a number of too many digits": (b"a: " + b"9" * 5000, "is not YAML: Exceeds the limit"),
    "NUL": (b"a: \0", "special characters are not allowed"),
    "not text": (b"a: \xff\xfe", "is not YAML: unacceptable character #x00ff"),
    "two documents": (b"a: 1\n---\nb: 2", "expected a single document"),
    "too much": (b"a: 1 # " + b"x" * 2**18, "has 262,151 characters; the limit for YAML is 262,144"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_is_none_or_too_much_is_one_line_that_names_the_file(case):
    content, reason = BAD_YAML[case]
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        parse_yaml(content, "my/options.yaml")
    assert str(error.value).startswith("my/options.yaml ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_yaml_within_bounds_is_read():
    assert parse_yaml(b"a: &a [1, x]\nb: *a\nc: {<<: {d: 2}}", "x") == {"a": [1, "x"], "b": [1, "x"], "c": {"d": 2}}
    assert parse_yaml("a: größer".encode("utf-16"), "x") == parse_yaml("a: größer", "x") == {"a": "größer"}
    assert parse_yaml(b"# nothing", "x") is None
    assert parse_yaml(b"\xef\xbb\xbf" + b'{"a": [1, null]}', "x") == {"a": [1, None]}
