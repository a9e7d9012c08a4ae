"""The one reader of command lines, and the commands that use it."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from rlx.bench import measuring as bench_measuring
from rlx.config.options import read_options
from rlx.problems import ConfigError
from rlx.types import Range

COMMANDS = ("bench", "diff", "evaluate", "export", "report", "watch")


@dataclass(frozen=True, kw_only=True)
class Options:
    run: str
    count: Annotated[int, Range(ge=1)] = 7
    rate: Annotated[float, Range(ge=0)] | None = None
    how: bool | Literal["grid"] = False
    sizes: tuple[Annotated[int, Range(ge=1)], ...] = (1, 2)
    names: tuple[str, ...] | None = None
    out: str | None = None


def told(*arguments: str, places: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read_options(Options, arguments, places)
    return [str(problem) for problem in refused.value.problems]


def test_values_are_typed_and_what_is_not_given_has_its_default():
    assert read_options(Options, ["run=0"]) == Options(run="0")
    given = "count=3 rate=1e-3 how=grid sizes=5,1_000 names=a=b,c out=null run=seed=0,lr=1"
    assert read_options(Options, given.split()) == Options(
        run="seed=0,lr=1", count=3, rate=1e-3, how="grid", sizes=(5, 1000), names=("a=b", "c")
    )
    found = read_options(Options, ["run=x", "rate=2", "how=true", "sizes=", "rate=null", "names="])
    assert (found.rate, found.how, found.sizes, found.names) == (None, True, (), None)
    assert type(read_options(Options, ["run=x", "rate=2"]).rate) is float
    assert read_options(Options, ["run=x", "count=1", "count=2"]).count == 2


def test_all_problems_are_told_at_once_and_say_what_is_accepted():
    assert told("cuont=3", "rate=nan", "count=1.0", "sizes=1,x", "how=[1", "run") == [
        "cuont=3: no such option; did you mean count?",
        "rate=nan: accepted: a float >= 0 or null",
        "count=1.0: accepted: an int >= 1; write 1",
        "sizes=1,x: accepted: an int >= 1, or several with commas between",
        "how=[1: cannot be read; write a number, true, false or null",
        "run: write key=value; --help lists the keys",
        "run: missing; give a string",
    ]
    assert told("run=x", "count=" + "[" * 5000)[0].endswith("write a number, true, false or null")


def test_places_take_what_has_no_key_of_an_option():
    places = ("run", "out")
    assert read_options(Options, ["seed=0", "b", "count=2"], places) == Options(
        run="seed=0", out="b", count=2
    )
    assert read_options(Options, ["out=b", "a"], places) == Options(run="a", out="b")
    assert told("count=2", places=places) == ["run: missing; accepted: RUN OUT"]
    assert told("a", "b", "c=1", places=places) == ["c=1: too many; accepted: RUN OUT"]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"rlx.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def module(name: str) -> Any:
    return importlib.import_module("rlx.bench.__main__" if name == "bench" else f"rlx.{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_with_its_default(name):
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == module(name).__doc__.strip()
    if name == "diff":
        return  # its options are two folders
    for field in dataclasses.fields(module(name).Options):
        (line, *_) = (t for t in done.stdout.splitlines() if t.startswith(f"    {field.name}="))
        said = line.removeprefix(f"    {field.name}=").partition(" ")[0]
        if field.default in (dataclasses.MISSING, None) and said != "null":
            assert said.isupper(), line  # must be given, or follows from others
        else:
            read = read_options(dataclasses.make_dataclass("One", [option(name, field)]), [
                f"{field.name}={said}"
            ])  # fmt: skip
            assert getattr(read, field.name) == field.default, line


def option(name: str, field: dataclasses.Field[Any]) -> tuple[str, Any]:
    hints = typing.get_type_hints(module(name).Options, include_extras=True)
    return field.name, hints[field.name]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_wrong_is_told_in_a_line_each_with_status_2(name):
    done = run(name, "a", "b", "sede=x", "oops=1")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    program = "rlx" if name == "evaluate" else f"rlx.{name}"
    assert len(lines) > 1
    assert all(line.startswith(f"{program}: ") for line in lines)


def test_the_benchs_setups_are_those_that_there_are():
    hint = typing.get_type_hints(module("bench").Options)["setup"]
    assert typing.get_args(hint) == (*(one.name for one in bench_measuring.SETUPS), "all")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("report", "", "runs, dataset: give one of them"),
        ("report", "runs=a dataset=b", "runs, dataset: give one of them"),
        ("report", "dataset=b out=c", "group, out: are options of runs=DIR"),
        ("bench", "what=learner torch=python", "torch=python: has the paper's network; add setup="),
        ("bench", "what=learner setup=pong torch=/no/python", "torch=/no/python: no such program"),
    ],
)
def test_options_that_do_not_go_together_are_refused(name, arguments, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        read_options(module(name).Options, arguments.split())
