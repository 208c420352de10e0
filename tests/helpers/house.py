"""The import graph of the product's sources, and the rules that it follows (see CONTRIBUTING.md)."""

import ast
import gc
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# Package as it is imported -> its folder in a checkout.
FOLDERS = {
    "longvlm.modeling_longvlm": "modeling_longvlm",
    "longvlm.processing": "processing",
    "longvlm.features": "features",
    "longvlm.conversion": "conversion",
    "longvlm.publishing": "publishing",
    "longvlm.training": "training",
    "longvlm.evaluation": "evaluation",
    "longvlm_cli": "longvlm/cli",
    "longvlm": "longvlm",
    "recipes": "recipes",
    "examples": "examples",
    "benchmarks": "benchmarks",
}
PRODUCT = ("longvlm", "longvlm_cli")
OUTSIDE = ("recipes", "examples", "benchmarks", "tests")

# What each room may import besides itself. `longvlm` alone is the face, `import longvlm`.
BASE = {"longvlm.modeling_longvlm", "longvlm.processing", "longvlm.registration", "longvlm.files", "longvlm.lazy"}
BASE |= {"longvlm.checkpoint_faults"}
MAY_IMPORT: dict[str, set[str]] = {
    "longvlm.modeling_longvlm": set(),
    "longvlm.processing": set(),
    "longvlm.files": set(),
    "longvlm.lazy": set(),
    "longvlm.bundled": set(),
    "longvlm.registration": {"longvlm.modeling_longvlm", "longvlm.processing"},
    "longvlm.quantization": set(),
    "longvlm.adapters": {"longvlm.files"},
    "longvlm.checkpoint_faults": {"longvlm.files"},
    "longvlm.loading": {
        "longvlm.modeling_longvlm",
        "longvlm.processing",
        "longvlm.adapters",
        "longvlm.bundled",
        "longvlm.checkpoint_faults",
        "longvlm.quantization",
    },
    "longvlm.features": BASE,
    "longvlm.conversion": BASE | {"longvlm.features"},
    "longvlm.publishing": BASE | {"longvlm"},
    "longvlm.training": BASE | {"longvlm.features", "longvlm.loading"},
    "longvlm.evaluation": BASE | {"longvlm.features", "longvlm.loading", "longvlm"},
    "longvlm": {"longvlm.bundled", "longvlm.loading", "longvlm.registration", "longvlm.processing"},
    "longvlm.__main__": {"longvlm_cli"},
}


def read_sources(root: Path) -> dict[str, str]:
    """Module name -> source, for everything but the tests. What is not Python, or generated, is left out."""
    sources = {}
    for package, folder in FOLDERS.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            if package == "longvlm" and parts[0] in ("cli", "longvlm-tiny"):
                continue
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, anywhere in its source."""
    packages = {name for name in sources if any(other.startswith(f"{name}.") for other in sources)}
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        graph[name] = set()
        for target in _imported(_parse(source), name, name in packages):
            if target.partition(".")[0] in (*PRODUCT, *OUTSIDE):
                graph[name].add(_module_of(target, sources))
        graph[name].discard(name)
    return graph


def _parse(source: str) -> ast.Module:
    """Without the garbage collector: a finalizer that parses in between breaks Python 3.11 (SystemError)."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def _imported(tree: ast.AST, name: str, is_package: bool) -> Iterator[str]:
    """Full names of what is imported, `package.module` or `package.module.attribute`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".") if is_package else name.split(".")[:-1]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_of(target: str, sources: Mapping[str, str]) -> str:
    """The longest part of the name that is a module; the whole name if none is."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in sources:
            return name
    return target


def room_of(module: str) -> str:
    """The rule in `MAY_IMPORT` that holds for a module: its package, or itself in the face."""
    for package in FOLDERS:
        if package != "longvlm" and (module == package or module.startswith(f"{package}.")):
            return package
    return module if module in MAY_IMPORT else module.partition(".")[0]


def find_circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    known = {name: {target for target in targets if target in graph} for name, targets in graph.items()}
    # The face imports what lies below it. Modules that import the face use it only when a function runs.
    known["longvlm"] = set()

    def reachable(name: str) -> set[str]:
        found, waiting = set(), [name]
        while waiting:
            new = known[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    return sorted(name for name in known if name in reachable(name))


def find_violations(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports that the rules forbid, as "importer imports imported: rule"."""
    found = []
    for module, targets in sorted(graph.items()):
        room = room_of(module)
        for target in sorted(targets):
            other = room_of(target)
            if room.partition(".")[0] in OUTSIDE:
                if other == "tests":
                    found.append(f"{module} imports {target}: only tests import tests")
            elif other in OUTSIDE:
                found.append(f"{module} imports {target}: the product imports neither tests nor recipes")
            elif room == "longvlm_cli" or other == room:
                continue
            elif other == "longvlm_cli" and room != "longvlm.__main__":
                found.append(f"{module} imports {target}: nobody imports the commands")
            elif {room, other} == {"longvlm.training", "longvlm.evaluation"}:
                found.append(f"{module} imports {target}: training and evaluation do not know each other")
            elif other not in MAY_IMPORT.get(room, set()):
                found.append(f"{module} imports {target}: {room} lies below {other}, or beside it")
    return found
