"""Errors that a user can cause end in one line on stderr and exit code 2; `LONGVLM_TRACEBACK=1` shows the traceback.

The library names arguments, in backquotes: "`llm` is a delta". Here they become the flags of the command that ran.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

LONGEST = 600  # characters
JOINERS = "\u200c\u200d"  # of Persian, Hindi and emoji; they do nothing else


def exit_code_for(error: BaseException, command: Any, arguments: Sequence[str]) -> int:
    """
    Prints one line about an error that a user can cause.

    Args:
        error: what ended the command.
        command: the top-level click command.
        arguments: its arguments.

    Returns:
        The exit code.

    Raises:
        error: it is a bug.
    """
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `longvlm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    if hasattr(error, "format_message"):  # click refused an option
        print(f"longvlm: error: {one_line(error.format_message())}", file=sys.stderr)
        return 2
    if os.environ.get("LONGVLM_TRACEBACK") or not _is_users(error):
        raise error
    for problem in getattr(error, "problems", None) or [error]:  # a checkpoint that fails several checks
        print(f"longvlm: error: {name_flags(one_line(problem), command, arguments)}", file=sys.stderr)
    return 2


def one_line(error: BaseException | str) -> str:
    """The message without line breaks and control characters; for an error that wraps another, the inner one."""
    if type(error).__name__.startswith("StrictDataclass"):
        error = getattr(error, "__cause__", None) or error
    text = " ".join(str(error).replace("Value error, ", "").split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"there is not enough memory ({text})"
    # Names of files may hold anything, such as what recolours a terminal.
    text = "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)
    # The remedy is at the end.
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def name_flags(text: str, command: Any, arguments: Sequence[str]) -> str:
    """Replaces arguments in backquotes with the flags of the command that `arguments` run."""
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    names = {}
    for parameter in command.params:
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        names[parameter.name] = flags[0] if flags else (parameter.metavar or str(parameter.name).upper())
    return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)


def _is_users(error: BaseException) -> bool:
    """Whether a user can cause (and cure) this error."""
    if isinstance(error, (ValueError, OSError, ImportError)):  # also VideoDecodeError, and those of huggingface_hub
        return True
    if isinstance(error, RecursionError) and "JSON" in str(error):  # a file of a checkpoint, nested too deeply
        return True
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"StrictDataclassError", "OutOfMemoryError", "HfHubHTTPError", "SafetensorError"})
