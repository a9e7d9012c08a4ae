"""docs/reference.md has every key of the configuration, as YAML and signatures have it; --help."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlx.config.build import ROLES, Root, setting_hints
from rlx.config.hints import describe
from rlx.config.targets import full_name
from rlx.problems import nearest

ROOT = Path(__file__).resolve().parent.parent
MADE = runpy.run_path(str(ROOT / "docs" / "make" / "reference.py"))


def test_the_page_is_made_of_the_yaml_and_the_signatures():
    says = "run python docs/make/reference.py --write"
    assert (ROOT / "docs" / "reference.md").read_text() == MADE["page"](), says


def test_every_key_of_every_class_has_a_type_a_default_and_a_meaning():
    page = (ROOT / "docs" / "reference.md").read_text()
    for group in ROLES:
        part = page[page.index(f"\n## {group}\n") :]
        for cls, keys in MADE["classes_of"](group).items():
            own = part[part.index(f"\n### {full_name(cls)}\n") :].split("\n### ")[1]
            assert list(keys) == list(setting_hints(cls))
            for name, hint in setting_hints(cls).items():
                (line,) = [row for row in own.splitlines() if row.startswith(f"| `{name}` |")]
                _, _, kind, default, meaning, _ = line.replace("\\|", "/").split("|")
                assert kind.strip() == describe(hint).replace("|", "/")
                assert default.strip() not in ("", "none"), (cls, name)
                assert meaning.strip(), (cls, name)


def test_every_root_key_is_explained():
    for name in setting_hints(Root):
        (line,) = [
            row
            for row in (ROOT / "docs" / "reference.md").read_text().split("\n## ")[1].splitlines()
            if row.startswith(f"| `{name}` |")
        ]
        assert line.split("|")[-2].strip()


def test_comments_of_nested_and_continued_lines_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "one: 1   # first\ntwo:\n  three: '#x' # of two,\n               # and more\nfour: []\n"
    )
    assert MADE["comments"](path) == {("one",): "first", ("two", "three"): "of two, and more"}


@pytest.fixture(scope="module")
def helped() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rlx.train", "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def test_help_has_the_groups_twenty_keys_and_where_the_rest_is(helped):
    for group in ROLES:
        assert f"\n  {group}: " in helped or f"\n{group}: " in helped
    keys = helped.split("set most:")[1].split("All keys")[0]
    named = [line.split()[0] for line in keys.splitlines() if line.strip()]
    assert len(named) == 20
    settings = yaml.safe_load(
        subprocess.run(
            [sys.executable, "-m", "rlx.train", "--cfg", "job"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout
    )  # fmt: skip
    for key in named:
        node = settings
        for part in key.split("."):
            assert part in node, f"{key}; did you mean {nearest(part, node)}?"
            node = node[part]
    pages = [word for word in helped.split() if word.startswith("docs/")]
    assert "docs/reference.md" in pages
    assert all((ROOT / page).is_file() for page in pages)
    assert len(helped.splitlines()) < 70
