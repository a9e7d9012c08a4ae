"""Imports point one way, and each heavy library has its few places (docs/design.md, section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "rlx").rglob("*.py"))

# A module imports only from lower layers, or from its own package.
LAYERS = [
    {
        "types",
        "problems",
        "_paths",
        "provenance",
        "seeding",
        "atari",
        "xla",
        "child",
        "boards",
        "folders",
        "signals",
    },
    {"trees", "interfaces", "ops", "hints", "targets", "flops", "tiles"},
    {"config", "optimizers", "metrics", "statistics"},
    {"networks", "replay", "envs", "progress", "results", "watch_runs", "notebook"},
    {"study"},
    {"report_figures"},
    {"report_page"},
    {"checkpoint", "nonfinite", "shares"},
    {"agents", "acting", "learner"},
    {"films"},
    {"evaluate"},
    {"ray_evaluator"},
    {"loop"},
    {"assemble", "composing"},
    {"learner_process"},
    {"ray_learners"},
    {"api"},
    {"jobs"},
    {"train", "report", "bench", "diff", "watch", "export", "sweeping"},
    {"ray_jobs", "search"},
    {"ray_bench", "replay_bench"},
    {"learner_bench"},
]
# These may import api inside a function.
ENTRY_POINTS = {"evaluate", "export", "report", "bench", "train"}

HYDRA = {"config", "composing", "api", "train", "evaluate", "report", "bench", "diff"} | {
    *("sweeping", "ray_jobs", "search"),
}
HOMES = {
    "ray": {
        f"acting/ray_{name}" for name in ("actors", "cluster", "fleet", "logs", "pool", "token")
    }
    | {"ray_learners", "learner_process", "ray_jobs"},
    "envpool": {"envs/envpool"},
    "hydra": HYDRA,
    "omegaconf": HYDRA,
}
DEVICE_CALLS = {"jit", "pmap", "device_put"}
DEVICE_HOMES = {"learner", "acting/policy", "acting/player", "replay/device"} | {
    *("evaluate", "export"),
    *(f"{what}bench" for what in ("", "replay_", "learner_")),
}
WITHOUT_JAX = {
    *("types", "seeding", "interfaces"),
    *("acting/actor", "acting/blocks", "acting/faults", "acting/remote", "acting/remote_env"),
    *("acting/whereabouts", "acting/wire"),
}


def name_of(file: Path) -> str:
    """'acting/policy' of rlx/acting/policy.py."""
    return file.relative_to(ROOT / "rlx").with_suffix("").as_posix()


def imported(node: ast.AST) -> list[str]:
    """The dotted names that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "write absolute imports"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(tree: ast.Module, *, top: bool = False) -> Iterator[str]:
    """All imports, or those that run when the module is imported."""
    inner = {id(n) for f in ast.walk(tree) if _is_function(f) for n in ast.walk(f)} if top else {}
    for node in ast.walk(tree):
        if id(node) not in inner:
            yield from imported(node)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def layer(part: str) -> int:
    for number, names in enumerate(LAYERS):
        if part in names:
            return number
    raise AssertionError(f"rlx.{part} has no layer: give it one in {__file__}")


def part_of(dotted: str) -> str | None:
    """'acting' of rlx.acting.policy.Policy; None for other packages and rlx itself."""
    parts = dotted.split(".")
    known = {name for names in LAYERS for name in names}
    return parts[1] if parts[0] == "rlx" and len(parts) > 1 and parts[1] in known else None


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file):
    own = name_of(file).split("/")[0]
    if own == "__init__":
        return
    tree = ast.parse(file.read_text())
    for dotted in imports(tree, top=own in ENTRY_POINTS):
        other = part_of(dotted)
        allowed = other is None or other == own or layer(other) < layer(own)
        assert allowed, f"rlx.{name_of(file)} imports {dotted}, which is not below it"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_libraries_stay_in_their_places(file):
    tree, name = ast.parse(file.read_text()), name_of(file)
    for dotted in imports(tree):
        homes = HOMES.get(dotted.split(".")[0])
        assert homes is None or name in homes, f"rlx/{name}.py imports {dotted}; only {homes} may"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_device_programs_stay_in_their_places(file):
    tree, name = ast.parse(file.read_text()), name_of(file)
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {dotted.split(".")[-1] for dotted in imports(tree) if dotted.startswith("jax")}
    used = found & DEVICE_CALLS
    assert not used or name in DEVICE_HOMES, f"rlx/{name}.py uses {used}; only {DEVICE_HOMES} may"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_thin_actors_and_replay_do_without_jax(file):
    name, tree = name_of(file), ast.parse(file.read_text())
    folder = name.split("/")[0]
    without = (
        name in WITHOUT_JAX or folder == "envs" or (folder == "replay" and "device" not in name)
    )
    if without or name == "trees":
        loaded = {dotted.split(".")[0] for dotted in imports(tree, top=name == "trees")}
        assert not loaded & {"jax", "flax", "optax"}, f"rlx/{name}.py loads {loaded}"


def test_what_an_actor_imports_loads_neither_jax_nor_hydra():
    thin = sorted(n.replace("/", ".") for n in WITHOUT_JAX | {"trees", "envs/common"})
    names = [n for n in thin if (ROOT / "rlx" / f"{n.replace('.', '/')}.py").exists()]
    code = f"import sys, rlx, {', '.join(f'rlx.{n}' for n in names)}; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"jax", "flax", "hydra", "omegaconf", "ray", "envpool"}
