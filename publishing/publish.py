"""Publishes a checkpoint folder on the Hub: checks, then one commit, or nothing at all.

    publish("my-longvlm", "me/my-longvlm", license="apache-2.0", base_model=["Qwen/Qwen3-0.6B"])

The folder itself is not changed. The checks run on exactly what is uploaded: a temporary folder of links with a card.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

import longvlm
from longvlm.publishing import checks
from longvlm.publishing.folder import collect_files
from longvlm.publishing.model_card import (
    NO_BASE_MODEL,
    check_card,
    complete_card,
    licence_warnings,
    make_card,
    read_config,
    read_video_options,
)

Progress = Callable[..., None]  # progress(stage: str, done: int = 0, total: int = 0)

CARD = "README.md"
# Files of an earlier version on the Hub that would be loaded together with, or instead of, the new ones.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")


class NotReady(ValueError):
    """The folder cannot be published as it is; `problems` says why, one line each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class PublishError(OSError):
    """The Hub could not be reached, or refused the upload; the message says in one line what to do."""


@dataclass
class Publication:
    """What is, or was, uploaded to the Hub."""

    repo_id: str
    sizes: dict[str, int]  # file in the repository -> bytes
    card: str
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # files and folders that are not published, see `collect_files`
    deleted: list[str] = field(default_factory=list)  # files of an earlier version that the commit removed
    url: str | None = None  # of the repository or the pull request; None: nothing was uploaded


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: Sequence[str] | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] | None = None,
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    new_card: bool = False,
    update_code: bool = False,
    exclude: Sequence[str] = (),
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Checks the folder and uploads it in one commit. A failed call can be repeated: it finishes the upload.

    Args:
        folder: a checkpoint, as `save_pretrained` of model and processor wrote it.
        repo_id: `USER/NAME`; the repository is created if there is none.
        license, base_model, license_name, license_link, datasets, language, tags, results: metadata of the card, see
            `make_card`. A licence and base models (or `["none"]`) are required. Default of `language`: `("en",)` in a
            new card, unchanged in the folder's own.
        new_card: write a new card even if the folder has a README.md. Default: use that one, with this metadata.
        update_code: upload the code of the installed version instead of the folder's.
        exclude: patterns of files that are not uploaded.
        private: whether a new repository is private. Default: the setting of the account.
        branch: branch to commit to; created if needed. Default: `main`.
        create_pr: open a pull request instead of committing.
        commit_message: default: names the version of this package.
        token: default: the one of `hf auth login`, or `HF_TOKEN`.
        dry_run: run the checks, but upload nothing; the network is not used.
        progress: called as `progress(stage)` at each step.

    Raises:
        NotReady: checks failed; nothing was uploaded.
        ValueError: `folder` is not a folder, `repo_id` is not valid, or both `branch` and `create_pr` are given.
        PublishError: the Hub could not be reached, or refused the upload. Nothing was committed.
    """
    progress = progress or (lambda stage, done=0, total=0: None)
    folder = _check_arguments(folder, repo_id, branch, create_pr)
    found = collect_files(folder, exclude)
    if found.problems:  # before any file is read
        raise NotReady(found.problems)
    files = found.files
    try:
        config = read_config(folder)
        read_video_options(folder)
    except ValueError as error:
        raise NotReady([str(error)]) from error
    try:
        own_card = None if new_card or CARD not in files else files[CARD].read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise NotReady([f"{CARD} is not UTF-8: save it as UTF-8, or write a new one with `new_card`"]) from None
    files.pop(CARD, None)
    if update_code:
        files = {name: path for name, path in files.items() if not name.endswith(".py")} | checks.installed_code()

    progress("checking the files")
    problems = [*checks.weight_problems(files), *checks.code_problems(files), *checks.text_problems(files)]
    about: dict[str, Any] = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "base_model": base_model,
        "datasets": datasets,
        "tags": tags,
        "results": results,
    }
    try:
        if own_card is not None:
            name = repo_id.split("/")[-1]
            card = complete_card(own_card, model_name=name, language=language, **about)
        else:
            card = make_card(folder, repo_id, language=language or ("en",), **about)
        problems += check_card(str(card), without_base_model=list(base_model or ()) == [NO_BASE_MODEL])
        problems += checks.problems_in_text(CARD, str(card))
    except Exception as error:  # the YAML parser and the readers of weights do not raise ValueError
        problems.append(f"the card cannot be made: {' '.join(str(error).split())}")
    if problems:
        raise NotReady(problems)

    with _staged(files, str(card)) as stage:
        progress("loading the checkpoint in a process without this package")
        if problems := checks.loading_problems(stage):
            raise NotReady(problems)
        staged = {name: stage / name for name in sorted({*files, CARD})}
        publication = Publication(
            repo_id=repo_id,
            sizes={name: path.stat().st_size for name, path in staged.items()},
            card=str(card),
            warnings=licence_warnings(card, config.to_dict()),
            left_out=found.left_out,
        )
        if not dry_run:
            progress("uploading")
            message = commit_message or f"LongVLM checkpoint (longvlm {longvlm.__version__})"
            with _hub_errors_in_one_line(repo_id):
                _upload(publication, staged, HfApi(token=token), private, branch, create_pr, message)
    return publication


def _check_arguments(folder: str | Path, repo_id: str, branch: str | None, create_pr: bool) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a checkpoint")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` {repo_id!r}: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` {repo_id!r} must be USER/NAME or ORGANISATION/NAME")
    if branch is not None and not re.fullmatch(r"(?!.*(\.\.|//))\w[\w./-]*", branch):
        raise ValueError(f"`branch` {branch!r:.100} cannot be the name of a branch")
    if branch is not None and create_pr:
        raise ValueError(f"`branch` {branch} and `create_pr` exclude each other: a pull request targets main")
    return folder


@contextmanager
def _staged(files: dict[str, Path], card: str) -> Iterator[Path]:
    """A temporary folder with exactly the files that are published."""
    with tempfile.TemporaryDirectory(prefix="longvlm-publish-") as temporary:
        stage = Path(temporary) / "checkpoint"
        for name, path in files.items():
            target = stage / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.symlink_to(path.resolve())
            except OSError:  # Windows, without permission to create links
                shutil.copyfile(path, target)
        (stage / CARD).write_text(card, encoding="utf-8", newline="")
        yield stage


def _upload(
    publication: Publication,
    staged: dict[str, Path],
    api: HfApi,
    private: bool | None,
    branch: str | None,
    create_pr: bool,
    message: str,
) -> None:
    repo_id = publication.repo_id
    url = str(api.create_repo(repo_id, private=private, exist_ok=True))
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=branch)
    publication.deleted = [
        name for name in there if name not in staged and any(fnmatch(name, pattern) for pattern in REPLACED)
    ]
    commit = api.create_commit(
        repo_id,
        operations=[
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in staged.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in publication.deleted),
        ],
        commit_message=message,
        revision=branch,
        create_pr=create_pr,
    )
    publication.url = commit.pr_url if create_pr else url if branch is None else f"{url}/tree/{branch}"


@contextmanager
def _hub_errors_in_one_line(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = _explain(error, repo_id)
        if message is None:
            raise
        raise PublishError(message) from error


AGAIN = "nothing was committed; try again, files that have arrived are not sent twice"


def _explain(error: BaseException, repo_id: str) -> str | None:
    """What went wrong between here and the Hub, and what to do about it; `None` if it was something else."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled):
            return "offline mode is on: unset HF_HUB_OFFLINE to publish"
        if isinstance(link, HfHubHTTPError):
            said = " ".join((link.server_message or str(link)).split())
            return _explain_status(link.response.status_code, said, repo_id)
    # The HTTP library differs between versions of the client, so it is recognised by its base class.
    http_error = HfHubHTTPError.__bases__[0]
    for link in chain:
        if isinstance(link, (http_error, ConnectionError, TimeoutError)):
            status = getattr(getattr(link, "response", None), "status_code", None)  # from the storage behind the Hub
            reason = " ".join(str(link).split()) or type(link).__name__
            if status is not None:
                return _explain_status(status, reason, repo_id)
            return f"the connection to the Hub failed ({reason}): {AGAIN}"
    if isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in ("hf_xet", "huggingface_hub"):
        return f"the upload failed ({' '.join(str(error).split())}): {AGAIN}"
    return None


def _explain_status(status: int, said: str, repo_id: str) -> str:
    if status == 401:
        return (
            "the Hub does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN to a token with "
            "write access"
        )
    full = status == 403 and any(word in said.lower() for word in ("storage", "quota"))
    if full or status in (402, 413, 507):
        return f"the Hub accepts no more data ({status}: {said}): free some storage, then try again"
    if status == 403:
        return f"this token may not write to {repo_id} (403: {said}): use another token, or another name"
    if status == 404:
        return f"the Hub cannot find {repo_id}, or the token may not see it (404: {said})"
    if status == 429:
        return f"the Hub is limiting requests (429: {said}): {AGAIN}"
    if status >= 500:
        return f"the Hub has an internal error ({status}: {said}): {AGAIN}"
    return f"the Hub refuses the upload ({status}: {said})"
