"""`longvlm publish`: a checkpoint folder goes to the Hub, after checks."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longvlm_cli.errors import one_line
from longvlm_cli.options import Progress, Quiet, silence_libraries


def publish_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder: model and processor.")],
    repo_id: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository to publish to; created if needed.")],
    license: Annotated[
        str | None,
        typer.Option(help="Licence, by its name on the Hub (apache-2.0). Required unless DIR's README.md names one."),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            help='Hub id of a model it was made from; repeatable. Default: from config.json. "none": from no model.'
        ),
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="Required by --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Required by --license other.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of a dataset it was trained on; may be repeated.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Code of a language it answers in (en); may be repeated.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="An additional tag; may be repeated.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON list of measured results (fields of huggingface_hub.EvalResult).")
    ] = None,
    new_card: Annotated[bool, typer.Option("--new-card", help="Write a new card even if DIR has a README.md.")] = (
        False
    ),
    update_code: Annotated[
        bool, typer.Option("--update-code", help="Upload the code of the installed version instead of DIR's.")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files that are not uploaded; may be repeated.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to; created if needed.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run the checks, show what would be uploaded, and upload nothing.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint and publish it on the Hub, in one commit. Its address goes to stdout.

    The token comes from `hf auth login` or HF_TOKEN.
    """
    from huggingface_hub.utils import disable_progress_bars

    from longvlm.publishing.model_card import read_results
    from longvlm.publishing.publish import publish

    silence_libraries()
    if quiet:
        disable_progress_bars()
    publication = publish(
        folder,
        repo_id,
        license=license,
        base_model=base_model or None,
        license_name=license_name,
        license_link=license_link,
        datasets=dataset or (),
        language=language or None,
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
        progress=Progress(disable=quiet),
    )
    for warning in publication.warnings:
        print(f"longvlm: warning: {warning}", file=sys.stderr)
    if publication.left_out:
        print(f"left out: {one_line(', '.join(publication.left_out))}", file=sys.stderr)
    if dry_run:
        _show(publication)
        return
    for name in publication.deleted:
        print(f"removed from the repository: {name}", file=sys.stderr)
    print(publication.url)


def _show(publication) -> None:
    """Prints the files with their sizes, and the head of the card."""
    for name, size in publication.sizes.items():
        print(f"{size:>15,}  {name}")
    print(f"{sum(publication.sizes.values()):>15,}  in {len(publication.sizes)} files, to {publication.repo_id}\n")
    head, rest = publication.card.removeprefix("---").split("\n---", 1)
    lines = [f"---{head}\n---", *rest.strip().splitlines()[:8]]
    print("\n".join(lines))
