"""Imports point one way, and each heavy library has its few places (docs/design.md, section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlx"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from its own row or a higher one; wherever the import stands.
ROWS = [
    {"types", "problems", "seeding", "machine"},
    {"trees", "interfaces", "ops", "statistics", "config", "cluster", "envs", "networks"},
    {"agents", "replay", "acting", "runs"},
    {"evaluation", "results", "sweeps"},
    {"training"},
    {"api", "bench", "notebook"},
    {"train", "evaluate", "export", "report", "watch", "diff"},
]
AT_THE_TOP = 18  # files
HYDRA = {"config", "api", "train", "results/live", "runs/folders", "runs/provenance"} | {
    *("evaluate", "report", "watch", "diff", "sweeps", "bench"),
}
HOMES = {
    "ray": {"cluster", "acting/ray_pool", "acting/ray_actors", "acting/ray_server"}
    | {"training/group", "training/group_process", "sweeps/ray_jobs"},
    "envpool": {"envs/envpool"},
    "hydra": HYDRA,
    "omegaconf": HYDRA,
}
DEVICE_CALLS = {"jit", "pmap", "device_put"}
DEVICE_HOMES = {"training/learner", "acting/policy", "evaluation/player", "replay/ring/device"} | {
    *("evaluate", "export", "bench"),
}
WITHOUT_JAX = {
    *("types", "seeding", "interfaces", "envs", "replay", "cluster", "runs/folders"),
    *("acting/actor", "acting/remote", "acting/remote_env"),
    "acting/wire",
}
WITH_JAX = {"replay/ring/device"}


def name_of(file: Path) -> str:
    """'acting/policy' of rlx/acting/policy.py."""
    return file.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


def lies_in(name: str, places: set[str]) -> bool:
    """True if a module is one of these, or in one of these packages."""
    return any(name == place or name.startswith(f"{place}/") for place in places)


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


def modules_of(dotted: str) -> str | None:
    """'acting/policy' of rlx.acting.policy.Policy; None for what is not rlx's."""
    parts = dotted.split(".")
    if parts[0] != "rlx":
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return "/".join(parts[1:end])
    return None


def row(name: str) -> int:
    part = name.split("/")[0]
    for number, names in enumerate(ROWS):
        if part in names:
            return number
    raise AssertionError(f"rlx/{part} has no row: give it one in {__file__}")


GRAPH = {
    name_of(file): {
        other
        for dotted in imports(ast.parse(file.read_text()))
        if (other := modules_of(dotted)) is not None
    }
    for file in FILES
}


@pytest.mark.parametrize("name", [name for name in GRAPH if name != "__init__"])
def test_imports_point_one_way(name):
    for other in GRAPH[name]:
        assert row(other) <= row(name), f"rlx/{name} imports rlx/{other}, which is above it"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_imports_go_round_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles({name: others - {name} for name, others in GRAPH.items()}) == []


def test_packages_of_one_row_do_not_import_each_other_in_a_circle():
    parts: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        own = name.split("/")[0]
        parts.setdefault(own, set()).update(other.split("/")[0] for other in others)
    assert circles({part: others - {part} for part, others in parts.items()}) == []


def test_few_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= AT_THE_TOP


def test_packages_load_nothing_by_themselves():
    loading = [f for f in PACKAGE.rglob("*/__init__.py") if f.read_text().strip()]
    assert [name_of(file) for file in loading] == ["results"]  # whose functions users import


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_libraries_stay_in_their_places(file):
    tree, name = ast.parse(file.read_text()), name_of(file)
    for dotted in imports(tree):
        homes = HOMES.get(dotted.split(".")[0])
        fits = homes is None or lies_in(name, homes)
        assert fits, f"rlx/{name}.py imports {dotted}; only {homes} may"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_device_programs_stay_in_their_places(file):
    tree, name = ast.parse(file.read_text()), name_of(file)
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {dotted.split(".")[-1] for dotted in imports(tree) if dotted.startswith("jax")}
    used = found & DEVICE_CALLS
    fits = not used or lies_in(name, DEVICE_HOMES)
    assert fits, f"rlx/{name}.py uses {used}; only {DEVICE_HOMES} may"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_thin_actors_and_replay_do_without_jax(file):
    name, tree = name_of(file), ast.parse(file.read_text())
    if (lies_in(name, WITHOUT_JAX) and name not in WITH_JAX) or name == "trees":
        loaded = {dotted.split(".")[0] for dotted in imports(tree, top=name == "trees")}
        assert not loaded & {"jax", "flax", "optax"}, f"rlx/{name}.py loads {loaded}"


def test_what_an_actor_imports_loads_neither_jax_nor_hydra():
    thin = {
        name_of(file)
        for file in FILES
        if lies_in(
            name_of(file), {n for n in WITHOUT_JAX if n not in ("replay", "cluster", "envs")}
        )
    }
    names = sorted(name.replace("/", ".") for name in thin | {"trees", "envs/lanes"})
    code = f"import sys, rlx, {', '.join(f'rlx.{n}' for n in names)}; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"jax", "flax", "hydra", "omegaconf", "ray", "envpool"}
