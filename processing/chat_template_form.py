"""Which form of content a chat template reads, a string or a list of parts: found by looking at the template.

As servers do it. Templates that index parts (`message.content[0].text`) count as well as those that loop over them.
What stands behind a question whether the content is a string does not count: such a template takes both forms.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

STRING, PARTS, AS_GIVEN = "string", "parts", "as given"
_PARTS_FILTERS = {"selectattr", "rejectattr", "map", "groupby", "first", "last", "join"}
_TEXT_FILTERS = {"trim", "string", "replace", "upper", "lower", "title", "capitalize", "indent", "safe", "escape", "e"}
_NEUTRAL_FILTERS = {"default", "d", "list", "reverse"}


@lru_cache
def content_form(chat_template: str) -> str:
    """
    `STRING`, `PARTS`, or `AS_GIVEN` for a template that reads some messages as strings and others as parts.

    Raises:
        jinja2.TemplateSyntaxError: it is not a Jinja template.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(chat_template).environment.parse(chat_template)
    names: frozenset[str] = frozenset()
    while (more := names | set(_new_names(tree, names))) != names:
        names = more
    forms = set(_reads(tree, names))
    return AS_GIVEN if len(forms) > 1 else forms.pop() if forms else STRING


# Nodes are told apart by the names of their classes: loading a processor must not need jinja2.


def _is(node, *kinds: str) -> bool:
    return type(node).__name__ in kinds


def _is_content(node, names) -> bool:
    """Whether an expression is a message's content: `message.content`, `message["content"]`, or a name for it."""
    if _is(node, "Name"):
        return node.name in names
    if _is(node, "Getattr"):
        return node.attr == "content"
    if _is(node, "Getitem"):
        is_slice = _is(node.arg, "Slice") and _is_content(node.node, names)
        return is_slice or (_is(node.arg, "Const") and node.arg.value == "content")
    if _is(node, "Filter"):
        return node.name in _NEUTRAL_FILTERS and _is_content(node.node, names)
    if _is(node, "Or", "And"):
        return _is_content(node.left, names) or _is_content(node.right, names)
    if _is(node, "CondExpr"):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    return False


def _new_names(tree, names) -> Iterator[str]:
    """Names that the template gives to content: with `set`, and as arguments of macros."""
    macros = {node.name: node for node in _walk(tree) if _is(node, "Macro")}
    for node in _walk(tree):
        if _is(node, "Assign") and _is(node.target, "Name") and _is_content(node.node, names):
            yield node.target.name
        if _is(node, "Call") and _is(node.node, "Name") and node.node.name in macros:
            for parameter, argument in zip(macros[node.node.name].args, node.args, strict=False):
                if _is_content(argument, names):
                    yield parameter.name


def _reads(node, names) -> Iterator[str]:
    """How content is read, each time that it is: as `STRING` or as `PARTS`."""
    if _is(node, "If", "CondExpr"):
        chain = [node, *getattr(node, "elif_", [])]
        if any(_asks_for_string(branch.test, names) for branch in chain):
            return
    if _is(node, "For"):
        if _is_content(node.iter, names):
            yield PARTS
        names = names - {target.name for target in _walk(node.target) if _is(target, "Name")}
    elif _is(node, "Getitem"):
        if _is_content(node.node, names) and _is(node.arg, "Const") and isinstance(node.arg.value, int):
            yield PARTS
    elif _is(node, "Getattr"):
        if _is_content(node.node, names) and hasattr(str, node.attr):
            yield STRING
    elif _is(node, "Filter"):
        if node.node is not None and _is_content(node.node, names):
            if node.name in _PARTS_FILTERS | _TEXT_FILTERS:
                yield PARTS if node.name in _PARTS_FILTERS else STRING
    elif _is(node, "Output", "Concat"):
        if any(_is_content(part, names) for part in node.nodes):
            yield STRING
    elif _is(node, "Add"):
        if _is_content(node.left, names) or _is_content(node.right, names):
            yield STRING
    elif _is(node, "Compare"):
        if any(operand.op in ("in", "notin") and _is_content(operand.expr, names) for operand in node.ops):
            yield STRING
    for child in node.iter_child_nodes():
        yield from _reads(child, names)


def _asks_for_string(test, names) -> bool:
    return any(_is(node, "Test") and node.name == "string" and _is_content(node.node, names) for node in _walk(test))


def _walk(node) -> Iterator[Any]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)
