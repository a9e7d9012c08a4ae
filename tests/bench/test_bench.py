"""The bench: what it prints, what it refuses, and whose cost running work is."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest

from rlx.bench import __main__ as bench
from rlx.bench import end_to_end
from rlx.bench import measuring as bench_measuring
from rlx.bench.learner import REPLAYS
from rlx.bench.rounds import until_updated
from rlx.config.build import plain
from rlx.config.composing import compose
from rlx.training.assemble import assemble
from rlx.training.stages import Stages


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlx.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_last_line_is_the_table_as_json():
    done = run("what=acting", "seconds=0.5", "setup=cartpole")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    found = json.loads(last)
    assert set(found) == {"what", "machine", "rows"}
    names = [f"acting/cartpole/{name}" for name in ("envpool", "envpool + policy", "local pool")]
    assert [row["name"] for row in found["rows"]] == names
    keys = {"name", "value", "unit", "ratio", "roofline", "least", "most"}
    assert all(set(row) == keys for row in found["rows"])
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in found["rows"])
    assert {row["roofline"] for row in found["rows"]} == {found["rows"][1]["value"]}
    assert all(row["least"] <= row["ratio"] <= row["most"] for row in found["rows"])
    assert len(table) == 1 + len(names)
    assert all(
        f"{row['value']:,.1f}" in line for row, line in zip(found["rows"], table[1:], strict=True)
    )


def test_threads_and_numbers_of_lanes_are_measured_beside_the_bare_loop():
    for arguments, names in (
        (("what=acting", "acting=threads"), ["acting/cartpole/thread pool"]),
        (("what=scaling", "lanes=1,3"), [f"scaling/cartpole/{n} lanes/local pool" for n in (1, 3)]),
    ):
        done = run(*arguments, "seconds=0.2", "setup=cartpole")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
        assert [row["name"] for row in rows if row["name"].endswith(" pool")] == names
        assert all(row["value"] > 0 < row["ratio"] for row in rows)


def test_a_whole_run_is_measured_beside_acting_and_updates_alone():
    done = run("what=end_to_end", "seconds=0.5", "setup=cartpole", "batch=4", "acting=threads")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    prefix = "end_to_end/cartpole/acting=threads/"
    rates = {row["name"].removeprefix(prefix): row["value"] for row in rows}
    assert list(rates) == ["acting", "updates", "whole", "acting, then updates"]
    assert min(rates.values()) > 0
    assert rates["acting, then updates"] < min(rates["acting"], rates["updates"])


def test_a_slice_of_a_whole_run_pays_for_no_update_before_it(tmp_path):
    cfg = compose(end_to_end._settings(bench_measuring.SETUPS[0], "threads", 4))
    with assemble(plain(cfg), tmp_path, resume=False) as parts:
        stages = Stages(parts)
        stages.publish()
        end_to_end._warm(stages, partial(until_updated, stages))
        assert parts.learner.updates > 0
        assert stages._in_flight is None


@pytest.mark.slow
def test_rays_actors_are_measured_beside_bare_processes():
    for what, name in (
        ("acting", "acting/cartpole/ray_pool/2 actors/pool"),
        ("weights", "weights/cartpole/0.2 MB to 2 actors/p50"),
        ("scaling", "scaling/cartpole/ray_pool/2 actors"),
        ("end_to_end", "end_to_end/cartpole/acting=ray_pool/whole"),
    ):
        done = run(f"what={what}", "acting=ray_pool", "seconds=1", "setup=cartpole", "actors=1,2")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
        (row,) = (row for row in rows if row["name"] == name)
        assert row["value"] > 0 < row["ratio"]


def test_rounds_are_measured_beside_acting_and_updates_alone():
    done = run("what=rounds", "seconds=0.5", "experiment=cartpole_ppo", "overrides=agent.unroll=8")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    rates = {row["name"].removeprefix("rounds/cartpole_ppo/"): row["value"] for row in rows}
    assert list(rates) == ["acting", "updates", "whole", "acting, then updates"]
    assert min(rates.values()) > 0
    assert rates["acting, then updates"] < min(rates["acting"], rates["updates"])


def test_updates_are_measured_beside_their_floor_and_profiled(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rlx.bench", "what=learner", "seconds=0.5", "setup=cartpole",
         "batch=4,8", "dtype=bfloat16", "profile=true",
         "replay=true"],
        capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path,
    )  # fmt: skip
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    work = {}
    for size in (4, 8):
        prefix = f"learner/cartpole/bfloat16/{size} sequences/"
        own = [row for row in rows if row["name"].startswith(prefix)]
        by_name = {(row["name"].removeprefix(prefix), row["unit"]): row for row in own}
        for name in ("floor", "compiled update", "learner path", *REPLAYS):
            updates, trained = by_name[name, "updates/s"], by_name[name, "trained rows/s"]
            assert trained["value"] == pytest.approx(20 * size * updates["value"])
        assert by_name["compiled update", "updates/s"]["ratio"] == 1
        assert by_name["floor", "updates/s"]["ratio"] > 1
        work[size] = by_name["update", "GFLOP"]["value"]
        spent = [row["value"] for row in own if row["unit"] == "ms/update"]
        assert len(spent) == 10
        assert spent == sorted(spent, reverse=True)
    assert work[8] == pytest.approx(2 * work[4])
    assert list(tmp_path.rglob("*.trace.json.gz"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "what: missing; give acting or learner or replay"),
        ("what=x", "what=x: accepted: acting or learner or replay"),
        ("what=learner batch=0", "batch=0: accepted: an int >= 1, or several with commas between"),
        ("what=learner dtype=x", "dtype=x: accepted: float32 or bfloat16, or several"),
        ("what=acting seconds=0", "seconds=0: accepted: a float > 0"),
        ("what=scaling acting=threads", "acting=threads: what=scaling accepts local"),
        (
            "what=end_to_end setup=cartpole acting=threads overrides=replay.ratio=null",
            "replay.ratio=null: acting and updates each have a rate of their own",
        ),
        ("what=all groups=", "groups: give one at least"),
        ("what=all overrides=replay.rtio=8", "replay.rtio=8 (command line): no such setting"),
        ("what=acting setup=x", "setup=x: accepted: cartpole or pong or all"),
        (
            "what=rounds experiment=cartpole_impala",
            "experiment=cartpole_impala: its agent ",
        ),
    ],
)
def test_anything_else_is_refused_in_one_line(capsys, given, says):
    with pytest.raises(SystemExit) as left:
        bench.main(given.split())
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rlx.bench: {says}")


def test_work_that_is_left_running_is_settled_in_its_own_slice(monkeypatch):
    monkeypatch.setattr(bench_measuring, "SLICE_S", 0.0)
    calls: list[str] = []

    def work(name: str) -> bench_measuring.Work:
        return lambda: calls.append(name) or 1.0  # type: ignore[func-returns-value]

    variants = {"a": work("a"), "b": work("b")}
    rates = bench_measuring.measure(variants, 1e-9, {"a": lambda: calls.append("settled a")})
    assert calls == ["a", "settled a", "b"] * 2  # once to compile, then one round
    assert [len(each) for each in rates.values()] == [1, 1]


def test_replays_are_measured_beside_a_plain_copy():
    done = run("what=replay", "seconds=0.1", "setup=cartpole", "rows=40000")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    found = {row["name"].removeprefix("replay/cartpole/40,000/"): row for row in rows}
    assert len(found) == len(rows)
    for storage in ("memory, 1 thread", "memory", "mmap", "device"):  # no frames: no LZ4
        assert found[f"{storage}/np.copyto"]["ratio"] == 1
        assert 0 < found[f"{storage}/sample + update"]["ratio"] < 1.5
        p50, p99 = (found[f"{storage}/sample + update, {p}"] for p in ("p50", "p99"))
        assert 0 < p50["value"] <= p99["value"]
        assert p50["unit"] == "ms"
        assert found[f"{storage}/insert"]["value"] > 1000
    assert found["memory/all bytes"]["value"] == found["mmap/all bytes"]["value"]
    assert run("what=replay", "rows=0").returncode == run("what=replay", "rows=x").returncode == 2
