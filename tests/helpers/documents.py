"""The pages a user reads, taken apart: fenced blocks, code spans, links, headings."""

import re
from dataclasses import dataclass
from functools import cache

from longvlm import tiny_checkpoint
from longvlm.publishing.model_card import make_card
from tests.helpers.paths import ROOT

REPO_ID = "me/my-longvlm"
CARD = "hub_card.md"
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("longvlm/*/*.md"),
        *ROOT.glob("evaluation/*/*.md"),
    )
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `str(block)` is the page and the line of its fence."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def page_text(page: str) -> str:
    """The text of a page; the template of model cards is filled in for the bundled checkpoint."""
    if page == CARD:
        return str(make_card(tiny_checkpoint(), REPO_ID, license="mit", base_model=["me/llm"]))
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks_of(page: str) -> tuple[Block, ...]:
    """All fenced blocks of a page. A fence that is never closed is an error."""
    blocks: list[Block] = []
    language, start, lines = None, 0, []
    for number, line in enumerate(page_text(page).splitlines(), 1):
        fence = line.strip().startswith(("```", "~~~"))
        if language is None and fence:
            language, start, lines = line.strip().strip("`~").strip(), number, []
        elif fence:
            blocks.append(Block(page, start, language or "", "\n".join(lines) + "\n"))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}:{start}: this block is never closed"
    return tuple(blocks)


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in one of these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def prose(page: str) -> str:
    """A page without its fenced blocks; of the changelog's table of moved names, only what they are now."""
    text = re.sub(r"^\s*(```|~~~).*?^\s*\1\s*$", "", page_text(page), flags=re.M | re.S)
    return re.sub(r"^  \|[^|\n]*\|", "|", text, flags=re.M) if page == "CHANGELOG.md" else text


def spans(page: str) -> list[str]:
    """The code spans of a page's prose."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))


def anchors(page: str) -> set[str]:
    """What a link to a heading of the page may say after the `#`."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
