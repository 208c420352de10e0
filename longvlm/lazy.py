"""Public names of a package, imported when they are first used: `import longvlm.training` stays cheap."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Args:
        package: `__name__` of the package.
        names: module of the package -> its public names. A name must not be that of a module: importing the module
            would replace it.

    Returns:
        The package's `__getattr__`, `__dir__` and `__all__`.
    """
    module_of = {name: module for module, listed in names.items() for name in listed}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return get, lambda: sorted(module_of), sorted(module_of)
