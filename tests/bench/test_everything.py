"""One table of speed: what is planned, what fails is named, and whatever ends it leaves files."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest

from rlx.bench import everything, tables
from rlx.bench.everything import Choices, Part, Table, plan
from rlx.bench.tables import Line, as_markdown, failed_line, read_line

GROUPS = ("acting", "replay", "learner", "weights", "end_to_end", "scaling")
CHOICES = Choices(
    groups=GROUPS, setup="cartpole", seconds=0.2, rows=20_000, batch=4, lanes=(), actors=(),
    overrides=("env.id=NoSuch-v9",),
)  # fmt: skip
LATE = "the minutes were over"


def part(group: str, name: str, choices: Choices = CHOICES) -> Part:
    (found,) = (each for each in plan(choices) if (each.group, each.name) == (group, name))
    return found


def lines_in(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "bench.csv").read_text().splitlines()))


def measured(folder: Path, *parts: Part, for_s: float = 300.0) -> Table:
    (folder / "logs").mkdir()
    table, ends_s = Table(folder, parts, "python -m rlx.bench what=all"), monotonic() + for_s
    for each in parts:
        table.measure(each, ends_s, LATE)
    return table


def test_every_group_and_setup_is_planned_with_the_options_given():
    parts = plan(replace(CHOICES, setup="all", lanes=(2, 4)))
    assert [*dict.fromkeys(each.group for each in parts)] == list(GROUPS)
    assert {each.setup for each in parts} == {"cartpole", "pong"}
    assert len({(each.group, each.setup, each.name) for each in parts}) == len(parts)
    scaling = part("scaling", "over lanes", replace(CHOICES, lanes=(2, 4)))
    assert scaling.arguments == ("what=scaling", "lanes=2,4", "setup=cartpole", "seconds=0.2")
    assert "batch=4" in part("learner", "learner path").arguments
    assert "overrides=env.id=NoSuch-v9" in part("end_to_end", "acting=threads").arguments
    assert "overrides" not in str(part("end_to_end", "cartpole_ppo").arguments)  # another agent


def test_what_fails_is_named_and_the_others_go_on(tmp_path):
    lost = part("end_to_end", "acting=local")
    measured(tmp_path, lost, part("learner", "learner path")).end("left out")
    first, *others = lines_in(tmp_path)
    assert (first["name"], first["value"], first["kind"]) == ("acting=local", "", "failed")
    assert first["note"].startswith("could not be made: env.id")
    assert "env.id='NoSuch-v9' is no EnvPool environment" in first["note"]
    own = [line for line in others if line["kind"] == "own"]
    assert [line["unit"] for line in own] == ["updates/s"]
    assert all(line["name"] == "float32/4 sequences/learner path" for line in own)
    for line in own:
        assert float(line["least"]) <= float(line["ratio"]) <= float(line["most"])
        assert float(line["value"]) > 0 < float(line["roofline"])
    page = (tmp_path / "bench.md").read_text()
    assert "GFLOP/s at best" in page
    prose = [line for line in page.splitlines() if not line.startswith(("|", "- command: "))]
    assert max(map(len, prose)) <= tables.WIDTH
    assert first["note"] in page
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_replay_that_is_too_large_is_named(tmp_path):
    measured(tmp_path, part("replay", f"{10**15:,}", replace(CHOICES, rows=10**15)))
    (line,) = lines_in(tmp_path)
    assert line["note"].startswith("could not be made: numpy")
    assert "Unable to allocate" in line["note"]


def test_nothing_more_is_measured_when_the_minutes_are_over(tmp_path):
    long = part("learner", "learner path", replace(CHOICES, seconds=1000.0))
    began = monotonic()
    measured(tmp_path, long, part("weights", "p50"), for_s=1.0)
    assert monotonic() - began < 250
    assert [line["note"] for line in lines_in(tmp_path)] == [f"could not be made: {LATE}"] * 2


def test_a_part_has_its_own_limit(tmp_path):
    long = replace(part("learner", "learner path", replace(CHOICES, seconds=1000.0)), most_s=1.0)
    measured(tmp_path, long)
    (line,) = lines_in(tmp_path)
    assert line["note"] == "could not be made: it did not end within 1 s; give fewer as seconds="


def test_ctrl_c_leaves_what_there_is(tmp_path):
    folder = tmp_path / "a" / "b"
    command = ["what=all", "seconds=1000.0", "setup=cartpole", "groups=learner", f"folder={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlx.bench", *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "learner, cartpole, learner path ...\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    (line,) = lines_in(folder)
    assert line["note"] == "could not be made: interrupted"
    page = (folder / "bench.md").read_text()
    assert f"- command: `python -m rlx.bench {' '.join(command)}`" in page
    asked = ["pgrep", "-f", "what=learner batch=.* setup=cartpole seconds=1000"]
    assert subprocess.run(asked, capture_output=True, check=False).stdout == b""


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (2, "a\nrlx.bench: env.id=x: no such\n", "env.id=x: no such"),
        (1, "Traceback\nModuleNotFoundError: No module named 'ray'\n\n", "ModuleNotFoundError: No"),
        (1, "x.y.XlaRuntimeError: OUT\n-----\nFor simplicity, JAX\n", "x.y.XlaRuntimeError: OUT"),
        (-signal.SIGKILL, "anything", "it was killed by SIGKILL; there may be too little memory"),
        (-signal.SIGABRT, "Check failed", "it was killed by SIGABRT: Check failed"),
        (1, "", "it said nothing"),
    ],
)
def test_the_reason_is_the_line_that_says_it(status, text, says):
    assert everything.reason(status, text).startswith(says)


def own_line(setup: str = "cartpole", ratio: float = 0.9, name: str = "local pool") -> Line:
    row = {"name": f"acting/{setup}/{name}", "value": 90.0, "unit": "env steps/s", "ratio": ratio}
    beside = {"roofline": 100.0, "least": ratio - 0.1, "most": ratio + 0.1}
    return read_line(row | beside, "acting", setup, ("local pool",))


def test_the_page_has_what_is_rlxs_own_and_what_failed():
    beside = own_line(name="envpool")
    assert (own_line().kind, beside.kind) == ("own", "beside")
    failed = failed_line("acting", "pong", "threads", "no | bar")
    page = as_markdown([own_line(), beside, failed], {"date": "today"}, "no picture")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table[2:] == [
        "| acting | cartpole | local pool | 90.0 env steps/s | 100 | 0.90 (0.80 to 1.00) |  |",
        "| acting | pong | threads |  |  |  | no \\| bar |",
    ]
    assert "- date: today" in page
    assert "Further figures" not in page


def test_nothing_is_cut_at_the_borders_of_the_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    lines = [own_line("a setup of a rather long name"), own_line("pong", name="a name " * 9)]
    assert everything._draw(lines, tmp_path / "a.png") == ""
    pixels = image.imread(tmp_path / "a.png")[..., :3]
    for border in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]):
        assert border.min() == 1.0


def test_without_matplotlib_there_is_no_picture_and_it_is_said(tmp_path, monkeypatch):
    assert everything._draw([own_line(), own_line("pong")], tmp_path / "a.png") == ""
    assert (tmp_path / "a.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = everything._draw([own_line()], tmp_path / "b.png")
    assert said == "There is no picture: matplotlib is not installed; pip install 'rlx[report]'."
    assert not (tmp_path / "b.png").exists()
