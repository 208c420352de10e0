"""The rules of the house (CONTRIBUTING.md), on the import graph of the sources: imports point downwards only."""

import ast
import re

import pytest

from tests.helpers.house import FOLDERS, find_circle, find_violations, import_graph, read_sources
from tests.helpers.paths import ROOT

SOURCES = read_sources(ROOT)


def graph_with(module: str, line: str) -> dict[str, set[str]]:
    """The graph as if `line` were added to a module."""
    assert module in SOURCES
    return import_graph({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})


def test_the_graph_is_that_of_the_sources():
    graph = import_graph(SOURCES)
    assert len(graph) > 100 and all(any(name.startswith(package) for name in graph) for package in FOLDERS)
    # An import at the top, one within a function, a relative one, and one of a package's attribute.
    assert "longvlm.files" in graph["longvlm.features.store"]
    assert "longvlm.conversion.llava" in graph["longvlm_cli.convert"]
    assert "longvlm.modeling_longvlm.token_merging" in graph["longvlm.modeling_longvlm.configuration_longvlm"]
    assert "longvlm.evaluation.storyline" in graph["recipes.tiny.recipe"]


def test_no_modules_import_each_other_in_a_circle():
    assert find_circle(import_graph(SOURCES)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("longvlm.files", "from longvlm.features import store"),
        ("longvlm.conversion.weights", "def later():\n    from longvlm.conversion.llava import convert_llava"),
        ("longvlm.modeling_longvlm.token_merging", "from . import configuration_longvlm"),
        ("longvlm.training.formats", "import longvlm.training.data"),
    ],
)
def test_a_line_that_closes_a_circle_is_found(module, line):
    assert module in find_circle(graph_with(module, line))


def test_imports_point_downwards():
    assert find_violations(import_graph(SOURCES)) == []


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("longvlm.modeling_longvlm.engine_longvlm", "from longvlm.features.store import FeatureReader", "lies below"),
        ("longvlm.modeling_longvlm.engine_longvlm", "from longvlm.processing import probe_video", "or beside it"),
        ("longvlm.processing.video_index", "def later():\n    import longvlm.files", "lies below"),
        ("longvlm.features.store", "from longvlm.training import data", "lies below"),
        ("longvlm.conversion.llava", "from longvlm.publishing.checks import weight_problems", "lies below"),
        ("longvlm.training.data", "from longvlm.evaluation.answers import token_f1", "do not know each other"),
        ("longvlm.evaluation.answers", "import longvlm.training.train", "do not know each other"),
        ("longvlm.evaluation.answers", "from recipes.tiny import recipe", "neither tests nor recipes"),
        ("longvlm.loading", "from tests.helpers import tiny_models", "neither tests nor recipes"),
        ("longvlm_cli.ask", "import benchmarks.token_merging", "neither tests nor recipes"),
        ("longvlm.training.train", "from longvlm_cli.options import Progress", "nobody imports the commands"),
        ("recipes.tiny.build", "from tests.helpers import tiny_models", "only tests import tests"),
        ("benchmarks.long_video", "from tests.helpers.tiny_models import tiny_longvlm", "only tests import tests"),
    ],
)
def test_a_line_that_breaks_a_rule_is_found(module, line, rule):
    (violation,) = find_violations(graph_with(module, line))
    assert violation.startswith(module) and rule in violation


def test_only_the_command_line_speaks_of_flags():
    """Errors and docstrings of the library name arguments; scripts may name their own flags."""
    scripts = [name for name, source in SOURCES.items() if 'if __name__ == "__main__"' in source]
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    for name, source in SOURCES.items():
        if not name.startswith("longvlm") or name.startswith("longvlm_cli") or name in scripts:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not flag.search(node.value), f"{name}, line {node.lineno}: {node.value!r:.200}"


def test_files_that_travel_import_relatively_and_have_names_of_their_own():
    """All of them are copied into one folder, where `longvlm` cannot be imported."""
    names = []
    for package in ("modeling_longvlm", "processing"):
        for file in (ROOT / package).glob("*.py"):
            names.append(file.name)
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level <= 1 and not (node.module or "").startswith("longvlm"), (
                        f"{file.name}: {node.module}"
                    )
                elif isinstance(node, ast.Import):
                    assert not any(alias.name.startswith("longvlm") for alias in node.names), file.name
    names = [name for name in names if name != "__init__.py"]
    assert len(names) == len(set(names))
