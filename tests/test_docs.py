"""README.md and docs/ name files, links, sections, modules, settings, commands that are there."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

import rlx
from rlx.config.options import read_options
from rlx.problems import ConfigError
from tests.test_imports import ROWS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
IN_THE_TREE = re.compile(r"^(?:rlx|conf|docs|tests|experiments|notebooks|hydra_plugins)/[\w./*-]+$")
WIDTH = 120  # columns of the pages in docs


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The sections of a page, as links name them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere within the repository."""
    wrong = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def missing_files(page: Path) -> list[str]:
    """The files of the tree that a page names in backticks and that are not there."""
    text = FENCE.sub("", page.read_text())
    named = [code for code in CODE.findall(text) if IN_THE_TREE.match(code)]
    return [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of rlx in a page: (module, arguments). Bare names and placeholders are none."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"python -m (rlx\.\w+[^\n`]*)", text)
    split = [shlex.split(line, comments=True) for line in lines]
    return [(words[0], words[1:]) for words in split if words[1:] and "..." not in words]


def read(module: str, arguments: list[str]) -> None:
    """Reads arguments as the command would; raises ConfigError for what it would refuse."""
    if module == "rlx.train":
        if not any(word.startswith(("-", "experiment=sweeps/")) for word in arguments):
            rlx.compose(arguments)
        return
    home = importlib.import_module("rlx.bench.__main__" if module == "rlx.bench" else module)
    read_options(home.Options, arguments, ("run_a", "run_b") if module == "rlx.diff" else ())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_are_there(page):
    assert missing_links(page) == []
    assert missing_files(page) == []


def test_a_link_a_section_or_a_file_that_is_not_there_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[a](page.md#a-page) [b](page.md#b) [c](c.md) `rlx/no_such_file.py`\n"
    )
    assert missing_links(page) == ["page.md#b", "c.md"]
    assert missing_files(page) == ["rlx/no_such_file.py"]


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_lines_are_not_too_wide(page):
    lines = FENCE.sub("", page.read_text()).splitlines()
    prose = [line for line in lines if not line.startswith(("|", "    "))]
    assert [line for line in prose if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page):
    for module, arguments in commands(page):
        read(module, arguments)


def test_a_command_that_would_be_refused_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`python -m rlx.train agent.n_stpe=1`\n    python -m rlx.export run=DIR wich=best\n"
    )
    for module, arguments in commands(page):
        with pytest.raises(ConfigError, match=r"n_step|which"):
            read(module, arguments)
    assert len(commands(page)) == 2


def test_the_tree_names_every_module():
    text = (ROOT / "docs" / "design.md").read_text()
    tree = text[text.index("## 2. Tree") : text.index("### Imports point one way")]
    named = re.findall(r"\w+\.py", tree)
    files = [p.name for p in (ROOT / "rlx").rglob("*.py") if p.name != "__init__.py"]
    assert sorted(named) == sorted(files)


def test_the_import_rows_are_those_of_the_test():
    text = (ROOT / "docs" / "design.md").read_text()
    part = text[text.index("### Imports point one way") :]
    block = part.split("```")[1]
    assert [set(re.findall(r"\w+", row)) for row in block.split("<-")] == ROWS


def test_the_table_of_claims_is_that_of_the_raw_numbers():
    claims = runpy.run_path(str(ROOT / "experiments" / "claims.py"))
    page = ROOT / "experiments" / "README.md"
    assert page.read_text() == claims["page"](), "run python experiments/claims.py"
    assert missing_links(page) == []
    names = {path.parent.name for path in (ROOT / "experiments").glob("*/study.py")}
    assert names == set(claims["STUDIES"])
