"""`longvlm publish`: a checkpoint folder goes to the Hub, after checks. Heavy imports stand inside the command."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def publish_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint: model and processor.")],
    repo_id: Annotated[str, typer.Option(metavar="USER/NAME", help="Where it goes; created if it is not there.")],
    license: Annotated[str | None, typer.Option(help="The Hub's name of its licence, such as apache-2.0.")] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(help='Hub id of what it was made of; once for each. "none": trained from scratch.'),
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of data that it was trained on.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Code of a language that it answers in (en).")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag more.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON list of measured results (fields of huggingface_hub.EvalResult).")
    ] = None,
    new_card: Annotated[bool, typer.Option("--new-card", help="Make the card anew, though DIR has a README.md.")] = (
        False
    ),
    update_code: Annotated[
        bool, typer.Option("--update-code", help="Upload the installed version's code instead of DIR's.")
    ] = False,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of files that stay here.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to; created if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the one commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would go, and upload nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Check a checkpoint and publish it on the Hub, in one commit; its address goes to stdout.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from longvlm.publishing.model_card import read_results
    from longvlm.publishing.publish import NotReady, publish

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if quiet:
        disable_progress_bars()
    try:
        publication = publish(
            folder,
            repo_id,
            license=license,
            base_model=base_model or None,
            license_name=license_name,
            license_link=license_link,
            datasets=dataset or (),
            language=language or ("en",),
            tags=tag or (),
            results=read_results(results) if results is not None else (),
            new_card=new_card,
            update_code=update_code,
            exclude=exclude or (),
            private=private or None,
            branch=branch,
            create_pr=create_pr,
            commit_message=commit_message,
            dry_run=dry_run,
            progress=(lambda step: None) if quiet else (lambda step: print(step, file=sys.stderr, flush=True)),
        )
    except NotReady as error:
        for problem in error.problems[:-1]:
            print(f"longvlm: error: {problem}", file=sys.stderr)
        raise ValueError(error.problems[-1]) from error
    for warning in publication.warnings:
        print(f"longvlm: warning: {warning}", file=sys.stderr)
    if dry_run:
        _show(publication)
        return
    for name in publication.deleted:
        print(f"removed from the repository: {name}", file=sys.stderr)
    print(publication.url)


def _show(publication) -> None:
    """The files with their sizes, and the head of the card."""
    for name, size in publication.sizes.items():
        print(f"{size:>15,}  {name}")
    print(f"{sum(publication.sizes.values()):>15,}  in {len(publication.sizes)} files, to {publication.repo_id}\n")
    head, rest = publication.card.removeprefix("---").split("\n---", 1)
    lines = [f"---{head}\n---", *rest.strip().splitlines()[:8]]
    print("\n".join(lines))
