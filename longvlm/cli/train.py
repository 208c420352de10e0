"""`longvlm train`: fine-tuning from a file of options."""

from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.options import Progress


def train_command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML or JSON file of options; see docs/training.md.")],
) -> None:
    """Fine-tune a model. Any option in the file can also be given as a flag, such as --learning_rate 1e-4."""
    if not config.is_file():
        raise ValueError(f"{config}: no such file")
    from longvlm.training.train import main

    main([str(config), *context.args], progress=Progress(unit="row"))
