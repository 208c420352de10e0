"""The command `longvlm`, one file per command.

This package is installed as `longvlm_cli`, since importing `longvlm` takes the seconds that torch and transformers
take. The commands import them inside their functions, so that help appears at once.
"""

import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from longvlm_cli.ask import ask_command
from longvlm_cli.assemble import assemble_command
from longvlm_cli.convert import convert
from longvlm_cli.errors import exit_code_for
from longvlm_cli.extract import extract_command
from longvlm_cli.inspect import inspect_command
from longvlm_cli.publish import publish_command
from longvlm_cli.train import train_command

app = typer.Typer(
    help="LongVLM: ask questions about long videos.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("ask")(ask_command)
app.command("inspect")(inspect_command)
app.command("assemble")(assemble_command)
app.add_typer(convert, name="convert")
app.command("extract")(extract_command)
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train_command)
app.command("publish")(publish_command)


def _version(value: bool) -> None:
    if value:
        print(f"longvlm {version('longvlm')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# What these have to say while they are imported and run concerns their developers.
QUIET_LIBRARIES = ("bitsandbytes", "torchao", "torch.utils._pytree", "torch.utils.cpp_extension")


def main() -> None:
    """Entry point of the command."""
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = app(prog_name="longvlm", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_for(error, typer.main.get_command(app), sys.argv[1:])
    sys.exit(code)


if __name__ == "__main__":
    main()
