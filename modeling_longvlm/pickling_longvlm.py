"""Lets a model be pickled after its hidden states were asked for.

transformers then hangs functions on the layers that `pickle` cannot name, and keeps them there. They are left out of
what is pickled or copied; the next call that needs them puts them back.
"""

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_INSTALLED = "_output_capturing_hooks_installed"  # transformers' note that they are there


def is_capturing_hook(hook) -> bool:
    """Whether transformers has put a hook there to collect hidden states or attentions."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def without_capturing_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a module, in which layers with such hooks are replaced by copies that share their weights."""
    return _without(state, {})


def _without(state: dict[str, Any], done: dict[nn.Module, nn.Module]) -> dict[str, Any]:
    kept = [key for key, hook in state["_forward_hooks"].items() if not is_capturing_hook(hook)]
    hooks = {name: type(state[name])((key, state[name][key]) for key in kept if key in state[name]) for name in _HOOKS}
    children = {
        name: None if child is None else _copy_without(child, done) for name, child in state["_modules"].items()
    }
    return {name: value for name, value in state.items() if name != _INSTALLED} | hooks | {"_modules": children}


def _copy_without(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:  # one module in two places stays one
        if any(map(_captures, module.modules())):
            done[module] = object.__new__(type(module))
            done[module].__dict__.update(_without(module.__dict__, done))
        else:
            done[module] = module
    return done[module]


def _captures(module: nn.Module) -> bool:
    return _INSTALLED in module.__dict__ or any(map(is_capturing_hook, module._forward_hooks.values()))


__all__ = ["is_capturing_hook", "without_capturing_hooks"]
