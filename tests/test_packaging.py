"""What is installed: wheel, sdist and editable all give `longvlm.*`, wherever Python is started.

The clean environment borrows the dependencies of this one (torch is gigabytes) through a .pth file, but nothing of
`longvlm` itself: the wheel is the only place where it can come from.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

MODULES = {
    "longvlm": "longvlm",
    "longvlm_cli": "longvlm/cli",
    "longvlm/modeling_longvlm": "modeling_longvlm",
    "longvlm/processing": "processing",
    "longvlm/features": "features",
    "longvlm/conversion": "conversion",
    "longvlm/publishing": "publishing",
    "longvlm/training": "training",
    "longvlm/evaluation": "evaluation",
    "longvlm/evaluation/storyline": "evaluation/storyline",
    "longvlm/evaluation/metrics": "evaluation/metrics",
    "longvlm/evaluation/metrics/short_answer": "evaluation/metrics/short_answer",
}
TINY = ROOT / "longvlm" / "longvlm-tiny"
CARD = "longvlm/evaluation/storyline/dataset_card.md"
IMPORT_ALL = """
import importlib, sys
import longvlm
for name in sys.argv[1:]:
    importlib.import_module(name)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY
assert type(AutoConfig.for_model("longvlm")) is longvlm.LongVLMConfig
assert "video-question-answering" in PIPELINE_REGISTRY.get_supported_tasks()
from longvlm.publishing.model_card import template
assert "{{ card_data }}" in template()
print(longvlm.__file__)
"""


def module_names():
    """Every module of the project, as it is imported."""
    names = []
    for package, folder in MODULES.items():
        for file in (ROOT / folder).glob("*.py"):
            if file.stem not in ("__init__", "__main__"):
                names.append(f"{package}/{file.stem}".replace("/", "."))
    return names


def run(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    inherited["PYTHONPATH"] = os.environ.get("PYTHONPATH", "") if "transformers" in environment else ""
    environment.pop("transformers", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**inherited, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def copy_of_the_project(folder):
    """The files that git knows or would take, without build outputs."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        source = ROOT / name
        if source.is_file() and "fixtures" not in name:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    project = copy_of_the_project(tmp_path_factory.mktemp("project"))
    out = tmp_path_factory.mktemp("dist")
    return out / run(sys.executable, "-c", BUILD, "build_wheel", out, cwd=project).splitlines()[-1]


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        entry_points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    expected = {
        f"{package}/{file.name}" for package, folder in MODULES.items() for file in (ROOT / folder).glob("*.py")
    }
    data = {f"longvlm/{TINY.name}/{file.name}" for file in TINY.glob("*") if file.is_file()}
    assert names == expected | data | {"longvlm/py.typed", "longvlm/hub_card.md", CARD}
    assert "License-Expression: Apache-2.0" in metadata and licences
    assert "longvlm = longvlm_cli.app:main" in entry_points


def test_wheel_holds_the_small_checkpoint_whole(wheel):
    import longvlm

    folder = longvlm.tiny_checkpoint()
    assert folder == TINY
    with zipfile.ZipFile(wheel) as archive:
        for file in folder.iterdir():
            if file.is_file():
                assert archive.read(f"longvlm/{TINY.name}/{file.name}") == file.read_bytes(), file.name
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 15e6


def test_no_two_files_that_travel_to_the_hub_share_a_name():
    names = [file.name for folder in ("modeling_longvlm", "processing") for file in (ROOT / folder).glob("*.py")]
    names = [name for name in names if name != "__init__.py"]
    assert len(names) == len(set(names))


def test_sub_packages_are_found_from_a_checkout_that_is_not_installed(tmp_path):
    project = copy_of_the_project(tmp_path)
    # -S: without site-packages, so without the editable install; the dependencies come back by PYTHONPATH.
    script = "import longvlm, longvlm.conversion as c; print(c.__file__)"
    printed = run(sys.executable, "-S", "-c", script, cwd=project, PYTHONPATH=sysconfig.get_paths()["purelib"])
    assert Path(printed.strip()) == project / "conversion" / "__init__.py"


def make_environment(folder):
    """A virtual environment that sees this one's dependencies, but not its `longvlm`."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    # As plain text a .pth file only adds a folder: editable installs listed in there are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(python, "-c", "import torch, importlib.util as u; assert u.find_spec('longvlm') is None", cwd=folder)
    return python


def install(python, package):
    # "--python": this environment's pip, working in the other one.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=ROOT.parent)


def check_installed(python, project):
    folder = python.parent.parent
    names = module_names()
    # From anywhere, and from the project's root, where the folder longvlm/ stands before the installed one.
    for cwd in (folder, project):
        where = Path(run(python, "-c", IMPORT_ALL, *names, cwd=cwd).splitlines()[-1])
        assert where.is_relative_to(folder if cwd == folder else project)
    assert run(folder / "bin" / "longvlm", "--version", cwd=folder).startswith("longvlm ")
    assert "ask" in run(python, "-m", "longvlm", "--help", cwd=folder)


@pytest.mark.slow
def test_wheel_in_a_clean_environment(wheel, tmp_path):
    python = make_environment(tmp_path / "clean")
    install(python, wheel)
    check_installed(python, copy_of_the_project(tmp_path / "project"))


@pytest.mark.slow
def test_sdist_in_a_clean_environment(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    out = tmp_path / "dist"
    out.mkdir()
    sdist = out / run(sys.executable, "-c", BUILD, "build_sdist", out, cwd=project).splitlines()[-1]
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tiny = {f"longvlm/{TINY.name}/{file.name}" for file in TINY.iterdir() if file.is_file()}
    assert {"modeling_longvlm/modeling_longvlm.py", "LICENSE", "pyproject.toml", "hub_card.md"} | tiny <= inside
    python = make_environment(tmp_path / "clean")
    install(python, sdist)
    check_installed(python, project)


@pytest.mark.slow
def test_installed_command_asks_about_a_video(wheel, tmp_path):
    from tests.helpers.video_files import write_video

    python = make_environment(tmp_path / "clean")
    install(python, wheel)
    video, command = write_video(tmp_path / "video.mp4", 24, rate=8), python.parent / "longvlm"
    answer = run(command, "ask", video, "What is the first object?", "--max-new-tokens", 4, cwd=tmp_path)
    assert answer.strip()


@pytest.mark.slow
def test_editable_install_sees_new_files(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    python = make_environment(tmp_path / "clean")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "--editable", project, cwd=tmp_path)
    (project / "conversion" / "brand_new.py").write_text("VALUE = 7\n")
    script = (
        "from longvlm.conversion.brand_new import VALUE; from longvlm.processing import video_decoding; print(VALUE)"
    )
    assert run(python, "-c", script, cwd=tmp_path).strip() == "7"
    # The template of the model card is the checkout's own file: what is changed there is seen at once.
    (project / "hub_card.md").write_text("changed")
    script = "from longvlm.publishing.model_card import template; print(template())"
    assert run(python, "-c", script, cwd=tmp_path).strip() == "changed"
