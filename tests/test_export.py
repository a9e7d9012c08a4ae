"""A run as one file: it runs where rlx cannot be imported, and acts as the run does."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

import rlx
from rlx import export
from rlx.envs.observations import raw_spaces_of
from rlx.evaluation.player import Player
from rlx.networks.torsos import ImpalaResNet, OneHotMLP
from rlx.types import ArraySpec, DiscreteSpec, EnvSpec
from tests import parts

ROOT = Path(__file__).resolve().parent.parent
GRID = EnvSpec(
    id="grid",
    observation={
        "direction": ArraySpec(shape=(), dtype="int32"),
        "image": ArraySpec(shape=(7, 7, 3), dtype="uint8"),
    },
    action=DiscreteSpec(n=3),
    frames_per_env_step=1,
)
WITHOUT_RLX = """
import sys
sys.modules["rlx"] = None  # importing it is an error from here on
path, given = sys.argv[1:]
import numpy as np
saved = np.load(given)
observations, rewards, firsts = saved["observation"], saved["reward"], saved["first"]
"""
AFTERWARDS = """
assert not {"flax", "optax", "hydra", "envpool", "ray"} & set(sys.modules)
np.save(given + ".actions.npy", np.stack(actions))
"""


def documented() -> str:
    """The lines of docs/using.md that run an exported agent."""
    text = (ROOT / "docs" / "using.md").read_text()
    (block,) = (b for b in text.split("```python\n")[1:] if "deserialize" in b)
    return block.partition("```")[0]


@pytest.fixture(scope="module")
def run(trained) -> Any:
    return rlx.load(trained)


def episode(rng: np.random.Generator, steps: int, lanes: int) -> dict[str, np.ndarray]:
    """Made-up observations of CartPole in which episodes end."""
    first = rng.random((steps, lanes)) < 0.2
    first[0] = True
    return {
        "observation": rng.normal(size=(steps, lanes, 4)).astype(np.float32),
        "reward": rng.normal(size=(steps, lanes)).astype(np.float32),
        "first": first,
    }


def actions_of(run: Any, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The actions of the run itself."""
    action, state = run.act(given["observation"][0])
    actions = [action]
    rest = (given[name][1:] for name in ("observation", "reward", "first"))
    for observation, reward, first in zip(*rest, strict=True):
        action, state = run.act(observation, state, reward=reward, first=first)
        actions.append(action)
    return actions


def test_the_documented_lines_run_it_without_rlx(run, trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    export.main([f"run={copy}"])
    path = capsys.readouterr().out.strip()
    assert path == str(copy / "agent.zip")
    given = episode(np.random.default_rng(0), 300, 3)  # the second action is rare
    np.savez(tmp_path / "given.npz", **given)
    code = WITHOUT_RLX + textwrap.dedent(documented()) + AFTERWARDS
    done = subprocess.run(
        [sys.executable, "-c", code, path, str(tmp_path / "given.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    actions = np.load(tmp_path / "given.npz.actions.npy")
    np.testing.assert_array_equal(actions, actions_of(run, given))
    assert set(actions.ravel()) == {0, 1}


def opened(data: bytes) -> tuple[dict[str, Any], Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        about = json.loads(file.read("agent.json"))
        return about, jax.export.deserialize(bytearray(file.read("act.jax_export")))


def test_the_description_says_what_goes_in_and_comes_out(run):
    about, function = opened(export.export(run, platforms=("cpu", "cuda")))
    assert about["env_id"] == "CartPole-v1"
    assert about["inputs"]["observation"] == {
        "observation": {"shape": ["batch", 4], "dtype": "float32"}
    }
    shapes = jax.tree.leaves(about["inputs"], is_leaf=lambda x: "shape" in x)
    told = [(x["dtype"], *x["shape"]) for x in shapes]
    inputs = jax.tree.unflatten(function.in_tree, function.in_avals)[0]
    assert len(inputs) == len(about["inputs"]) == 4
    in_order = jax.tree.leaves(dict(zip(about["inputs"], inputs, strict=True)))
    assert told == [(x.dtype.name, *map(_size, x.shape)) for x in in_order]
    action, state = jax.tree.unflatten(function.out_tree, function.out_avals)
    assert about["outputs"]["action"] == {
        **{"shape": ["batch"], "dtype": action.dtype.name},
        **{"low": 0, "high": 1},
    }
    assert set(about["outputs"]["state"]) == set(state)
    assert tuple(about["platforms"]) == function.platforms == ("cpu", "cuda")
    restored = run.restore()
    assert about["checkpoint"] == {
        **{"name": restored.path.name, "env_steps": restored.env_steps},
        "updates": restored.meta["updates"],
    }
    assert about["versions"]["jax"] == jax.__version__


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else str(size)


class Whole:
    """Has what `export.export` asks of a run, around a network made here."""

    def __init__(self, spec: EnvSpec, **network: Any) -> None:
        self.agent = parts.agent(parts.network(spec, **network))
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(self.agent.init, jax.random.PRNGKey(0))
        self.state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
        self.family, self.path = None, Path("000000000001")
        self.env_steps, self.meta = 1, {"updates": 2}

    def restore(self, which: str) -> Whole:
        return self


@pytest.mark.parametrize(
    ("spec", "network", "batch"),
    [
        (parts.IMAGE, {}, None),
        (parts.IMAGE, {}, 40),  # in chunks on CPUs
        (
            parts.IMAGE,
            {"torso": ImpalaResNet(channels=(2,), blocks=1, remat=True), "core": "gru"},
            None,
        ),
        (
            GRID,
            {"torso": OneHotMLP(categories=(11, 6, 3), layers=(8,)), "stack": {}, "core": "none"},
            None,
        ),
    ],
    ids=["convolutions", "chunks", "impala", "grid"],
)
def test_every_kind_of_network_acts_the_same_in_any_number_of_lanes(spec, network, batch):
    whole: Any = Whole(spec, **network)
    about, function = opened(export.export(whole, batch=batch))
    act = Player(
        agent=whole.agent, raw_spaces=raw_spaces_of(None, spec), params=whole.state.params
    ).act
    rng = np.random.default_rng(1)
    for n in (batch,) if batch else (1, 3):
        inputs = parts.inputs(spec, 4, n, rng=rng)
        leaves = about["inputs"]["state"].items()
        exported = {name: np.zeros((n, *x["shape"][1:]), x["dtype"]) for name, x in leaves}
        state, seen = None, []
        for t in range(4):
            observation = {
                name: np.clip(x[t], 0, 2) if spec is GRID else x[t]
                for name, x in inputs.observation.items()
            }
            reward = inputs.prev_reward[t].astype(np.float32)
            first = np.ones(n, bool) if state is None else inputs.first[t]
            told: dict[str, Any] = {} if state is None else {"reward": reward, "first": first}
            mine, state = act(observation, state, **told)
            action, exported = function.call(observation, reward, first, exported)
            np.testing.assert_array_equal(mine, action)
            seen.append(mine)
        for name, leaf in state.leaves.items():
            np.testing.assert_allclose(leaf, exported[name], rtol=1e-4, atol=1e-5)


def refused(capsys, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as left:
        export.main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_what_is_refused(capsys, trained, tmp_path, monkeypatch):
    run = f"run={trained}"
    assert refused(capsys) == ["rlx.export: run: missing; give a string"]
    assert refused(capsys, run, "batch=0") == [
        "rlx.export: batch=0: accepted: symbolic or an int >= 1"
    ]
    (line,) = refused(capsys, run, "platforms=cpu,gpu")
    assert line.startswith("rlx.export: platforms=cpu,gpu: accepted: one or more of cpu, cuda")
    (line,) = refused(capsys, run, f"out={tmp_path}/nowhere/agent.zip")
    assert line.endswith("cannot be written; give out=FILE in a folder that exists")
    (line,) = refused(capsys, run, "which=nope")
    assert line.startswith("rlx.export: which=nope: ")
    (line,) = refused(capsys, f"run={tmp_path}")
    assert line.startswith(f"rlx.export: run={tmp_path}: no run is there")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    (line,) = refused(capsys, run)
    assert line.endswith("flatbuffers, which is not installed; pip install 'rlx[export]'")
    assert not (trained / "agent.zip").exists()


def test_every_option_is_explained_and_has_a_default(capsys):
    names = {field.name for field in dataclasses.fields(export.Options)}
    assert export.Options(run="x").batch == "symbolic"
    export.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name}=" in shown for name in names)
