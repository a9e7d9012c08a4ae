"""The pages of docs/agents list every setting with its default, and name code that is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted((ROOT / "docs" / "agents").glob("*.md"))
YAMLS = sorted(path.stem for path in (ROOT / "conf" / "agent").glob("*.yaml"))
COLUMN = re.compile(r"default of `(\w+)`")  # of the YAML of this name
PLACE = re.compile(r"`(rlx/[\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)")
METRIC = re.compile(r"`((?:learner|replay|weights)/\w+)`")


def settings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a YAML by their paths, but for its own `_target_` and Hydra's defaults."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from settings(value, f"{prefix}{name}.")
        elif prefix or name not in ("_target_", "defaults"):
            yield prefix + name, value


def documented(text: str) -> dict[str, dict[str, Any]]:
    """Returns the settings that a page's tables list, with their defaults, by YAML."""
    found: dict[str, dict[str, Any]] = {}
    columns: dict[int, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "setting":
            heads = enumerate(map(COLUMN.fullmatch, cells))
            columns = {i: match[1] for i, match in heads if match is not None}
        elif not line.startswith("|"):
            columns = {}
        for i, name in columns.items():
            if cells[0].startswith("`"):
                value = yaml.safe_load(cells[i].strip("`"))
                assert found.setdefault(name, {}).setdefault(cells[0].strip("`"), value) == value
    return found


def definitions(path: Path) -> set[str]:
    """The functions and classes of a module, and `Class.method`."""
    kinds = ast.FunctionDef | ast.ClassDef
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    inner = {
        f"{node.name}.{inside.name}"
        for node in top
        if isinstance(node, ast.ClassDef)
        for inside in node.body
        if isinstance(inside, kinds)
    }
    return {node.name for node in top} | inner


def unknown_places(text: str) -> list[str]:
    """The `file`: `name` of a text that are not there."""
    wrong = []
    for file, names in PLACE.findall(text):
        known = definitions(ROOT / file) if (ROOT / file).exists() else set()
        wrong += [f"{file}: {name}" for name in re.findall(r"[\w.]+", names) if name not in known]
    return wrong


@pytest.mark.parametrize("name", YAMLS)
def test_a_page_lists_the_settings_of_the_yaml_with_their_defaults(name):
    tree = yaml.safe_load((ROOT / "conf" / "agent" / f"{name}.yaml").read_text())
    found = [options[name] for page in PAGES if name in (options := documented(page.read_text()))]
    assert found == [dict(settings(tree))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_and_the_metrics_that_a_page_names_are_there(page):
    text = page.read_text()
    assert PLACE.search(text)
    assert unknown_places(text) == []
    sources = "".join(path.read_text() for path in (ROOT / "rlx").rglob("*.py"))
    assert [name for name in METRIC.findall(text) if f'"{name}"' not in sources] == []


def test_what_is_left_out_wrong_or_gone_is_seen():
    table = "| setting | default of `one` | unit |\n|---|---|---|\n| `a` | `1.0e-3` | rows |\n"
    assert documented(table + "\n| `b` | `2` | |\n") == {"one": {"a": 0.001}}
    assert unknown_places("`rlx/ops.py`: `rescale`, `rescal`") == ["rlx/ops.py: rescal"]
    assert unknown_places("`rlx/no.py`: `a`") == ["rlx/no.py: a"]
