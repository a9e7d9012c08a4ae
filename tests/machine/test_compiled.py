"""Compiled programs that are kept from one start to the next."""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from time import time

import pytest

from rlx.machine import compiled

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "run"
# Compiles two programs and says how many of them were found, and what one gives.
PROGRAM = """
import sys
from rlx.machine import xla
settings = {"learner": {"memory_fraction": None}, "deterministic": False}
xla.prepare(settings | {"compile_cache": sys.argv[1] == "true"})
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
x = jnp.linspace(0.0, 1.0, 101)
y = jax.jit(lambda x: (jnp.sin(x) @ jnp.cos(x)) / x.sum())(x)
print(sum(hits), float(y).hex())
"""


def started(tmp_path: Path, keeps: bool = True, umask: int = -1, **variables: str) -> list[str]:
    """Compiles the same programs in a new process; returns what it prints."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "NPROC"))}
    mine |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", PROGRAM, str(keeps).lower()]
    done = subprocess.run(
        command, env=mine, capture_output=True, text=True, timeout=300, umask=umask
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.split(), done.stderr]


def programs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*-cache") if path.is_file()]


@pytest.mark.parametrize("given", ["", "here", "./here"])
def test_a_relative_folder_for_caches_is_ignored(monkeypatch, given) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/home/of")
    assert compiled.base_folder() == Path("/home/of/.cache/rlx/xla")


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path: Path) -> None:
    first, second = started(tmp_path), started(tmp_path)
    assert first[0] == "0"
    assert int(second[0]) == len(programs(tmp_path)) > 1
    assert first[1] == second[1]  # the same bits
    more = str(1 + len(os.sched_getaffinity(0)))
    started(tmp_path, NPROC=more)  # other threads share sums in another way
    assert int(second[0]) < len(programs(tmp_path))


def test_nothing_is_kept_where_the_setting_says_so(tmp_path: Path) -> None:
    assert started(tmp_path, keeps=False)[0] == "0"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_the_user_gave_jax_is_used(tmp_path: Path) -> None:
    given = tmp_path / "given"
    more = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    started(tmp_path, JAX_COMPILATION_CACHE_DIR=str(given), **more)
    assert programs(given)
    assert not (tmp_path / "rlx").exists()


def test_a_folder_that_others_may_write_into_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "rlx" / "xla"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    hits, _, said = started(tmp_path)
    assert hits == "0"
    assert "compiled programs are not kept" in said
    assert "chmod go-w" in said
    assert not programs(tmp_path)


def test_a_umask_that_lets_the_group_write_hinders_nothing(tmp_path: Path) -> None:
    assert "not kept" not in started(tmp_path, umask=0o002)[2]
    assert programs(tmp_path)


def test_a_program_that_was_cut_short_is_compiled_anew(tmp_path: Path) -> None:
    started(tmp_path)
    broken = max(programs(tmp_path), key=lambda path: path.stat().st_size)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    hits, _, said = started(tmp_path)
    assert int(hits) == len(programs(tmp_path)) - 1
    assert "Error" not in said  # else JAX would say so at each start
    assert broken.stat().st_size > len(whole) // 2
    assert int(started(tmp_path)[0]) == len(programs(tmp_path))


def test_only_new_programs_are_looked_into(tmp_path: Path) -> None:
    old, new = tmp_path / "old-cache", tmp_path / "new-cache"
    old.write_bytes(b"cut short")
    os.utime(old, (1, 1))
    (tmp_path / compiled.CHECKED).touch()
    new.write_bytes(zlib.compress(b"whole")[:-1])
    compiled.remove_broken(tmp_path)
    assert old.exists()
    assert not new.exists()


def test_a_check_that_was_interrupted_is_made_again(tmp_path: Path, monkeypatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    broken = tmp_path / "0-cache"
    broken.write_bytes(b"cut short")
    with monkeypatch.context() as changed:
        changed.setattr(compiled, "_programs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled.remove_broken(tmp_path)
    os.utime(broken, (time() - 1, time() - 1))  # it was there when the check began
    compiled.remove_broken(tmp_path)
    assert not broken.exists()


def test_files_of_jax_that_are_no_programs_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "0-atime", tmp_path / ".lockfile", tmp_path / "autotune" / "0.textproto"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no program")
    compiled.remove_broken(tmp_path)
    compiled.remove_oldest(tmp_path, 0)
    assert all(path.exists() for path in others)


LOAD = """
import sys, rlx
rlx.load(sys.argv[1])
import jax
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("keeps", [True, False])
def test_a_run_that_is_loaded_keeps_programs_as_it_was_told(tmp_path: Path, keeps: bool) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN, run)
    saved = run / ".hydra" / "config.yaml"
    saved.write_text(f"{saved.read_text()}\ncompile_cache: {str(keeps).lower()}\n")
    mine = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    mine |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOAD, str(run)]
    done = subprocess.run(command, env=mine, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() != "None") == keeps


def test_the_programs_that_were_used_last_stay(tmp_path: Path) -> None:
    paths = [tmp_path / kind / name for kind in ("a", "b") for name in ("0-cache", "1-cache")]
    for path, used in zip(paths, (3, 1, 4, 2), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (used, used))
    compiled.remove_oldest(tmp_path, 250)
    assert [path.exists() for path in paths] == [True, False, True, False]
    compiled.remove_oldest(tmp_path, 0)
    assert not programs(tmp_path)


@pytest.mark.parametrize(
    ("line", "other"),
    [("flags : sse avx2", "flags : sse"), ("model name : A", "model name : B")],
)
def test_machines_with_other_cpus_share_nothing(tmp_path: Path, line: str, other: str) -> None:
    def kind(text: str) -> str:
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        return compiled.machine_kind(path)

    assert kind(f"processor : 0\n{line}\ncpu MHz : 1\n") != kind(f"processor : 0\n{other}\n")
    assert kind(f"processor : 0\n{line}\ncpu MHz : 1\n") == kind(f"{line}\nprocessor : 1\n{line}\n")
    assert compiled.machine_kind(tmp_path / "nothing")
