"""Small classes for every role, and a conf/ of them, so that these tests need no other module."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from rlx import api
from rlx.config import build as config
from rlx.config import targets
from rlx.problems import RunFailed, refuse
from rlx.runs import provenance
from rlx.types import Range, Runtime


class Schedule(Protocol):
    def value(self, step: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    rate: Annotated[float, Range(gt=0, lt=1)]

    def value(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True, kw_only=True)
class Adam:
    learning_rate: Schedule
    max_norm: Annotated[float, Range(gt=0)] | None


@dataclass(frozen=True, kw_only=True)
class SGD:
    momentum: float


class Anything(Protocol):
    size: int


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int


@dataclass(frozen=True, kw_only=True)
class Family:
    id: str
    options: dict[str, Any]
    frames: tuple[int, int]

    def problems(self) -> list[str]:
        known = self.id in ("CartPole", "Pong")
        return [] if known else [f"env.id={self.id} is unknown; accepted: CartPole, Pong"]


class EnvRole(Protocol):
    def problems(self) -> list[str]: ...


class AgentRole(Protocol):
    unroll: int


@dataclass(frozen=True, kw_only=True)
class Agent:
    unroll: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    double: bool
    dtype: Literal["float32", "bfloat16"]
    layers: tuple[Annotated[int, Range(ge=1)], ...]
    stack: dict[str, Annotated[int, Range(ge=1)]]
    optimizer: Adam | SGD
    period: Annotated[int | None, Range(ge=1)]
    spec: Runtime[str]


class Pool:
    """A plain class with a keyword-only constructor."""

    def __init__(
        self,
        *,
        instances: Annotated[int, Range(ge=1)],
        envs_per_actor: int,
        agent: Runtime[Any],
        chain: Runtime[int] = 0,
        name: str = "pool",
    ) -> None:
        if instances > envs_per_actor * 100:
            raise ValueError(f"instances={instances} is too many")
        self.instances, self.agent, self.chain = instances, agent, chain


def a_function() -> None: ...


class _Private:
    size = 1


SHADOW = Path  # an allowed module that holds a class of another package


GROUPS = {
    "env/cartpole": """
        _target_: tests.standins.Family
        id: CartPole
        options: {}
        frames: [1, 2]""",
    "agent/r2d2": """
        _target_: tests.standins.Agent
        unroll: 8
        discount: 0.99
        double: true
        dtype: float32
        layers: [64, 64]
        stack: {}
        period: null
        optimizer:
          _target_: tests.standins.Adam
          max_norm: 40
          learning_rate:
            _target_: tests.standins.Constant
            rate: 1e-3""",
    "agent/iqn": """
        defaults: [r2d2, _self_]
        unroll: 1""",
    "acting/local": """
        _target_: tests.standins.Pool
        instances: 1
        envs_per_actor: 4""",
    "acting/ray_pool": """
        _target_: tests.standins.Pool
        instances: 128
        envs_per_actor: 32""",
    "experiment/long": """
        defaults:
          - override /agent: r2d2
        agent:
          unroll: 80
        seed: 7""",
    "experiment/forgetful": """
        agent:
          unroll: 80""",
    "experiment/broken": """
        defaults:
          - override /acting: ray_pol""",
} | {f"{g}/default": "_target_: tests.standins.Part\nsize: 1" for g in config.ROLES}

ROOT = """
defaults:
  - env: cartpole
  - network: default
  - replay: default
  - agent: r2d2
  - exploration: default
  - acting: local
  - learner: default
  - evaluation: default
  - checkpoint: default
  - logging: default
  - _self_
  - experiment: null
  - override hydra/job_logging: rlx
seed: 0
total_env_steps: 1000
stop_after_s: null
stop_after_updates: null
resume: null
deterministic: false
compile_cache: true
hooks: []
init_from: null
init_params: ['*']
schedules: []
tags: []
hydra:
  run: {dir: 'outputs/${now:%H-%M-%S-%f}'}
  sweep: {dir: multirun}
"""


def write_conf(folder: Path) -> Path:
    """A conf/ of stand-ins."""
    for name, text in GROUPS.items():
        header = "# @package _global_\n" if name.startswith("experiment/") else ""
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + "\n".join(line[indent:] for line in lines) + "\n")
    (folder / "config.yaml").write_text(ROOT)
    job_logging = folder / "hydra" / "job_logging"
    job_logging.mkdir(parents=True)
    real = Path(__file__).parent.parent / "conf" / "hydra" / "job_logging" / "rlx.yaml"
    (job_logging / "rlx.yaml").write_text(real.read_text())
    return folder


def search_path(*folders: Path) -> str:
    """A PYTHONPATH of these folders and what it holds already."""
    held = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([held] if held else [])])


def roles() -> dict[str, str]:
    """The role table of these stand-ins."""
    special = {"env": "EnvRole", "agent": "AgentRole", "acting": "Pool"}
    return {group: f"tests.standins.{special.get(group, 'Anything')}" for group in config.ROLES}


def start(settings: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Instead of training: writes the settings down, or fails as the seed says."""
    if settings["seed"] == 13:
        raise RuntimeError("unlucky")
    if settings["seed"] == 14:
        (output_dir / "checkpoints" / "000100").mkdir(parents=True)
        raise RunFailed("the replay is lost")
    if settings["seed"] == 99:
        raise refuse("replay.capacity", "28 GB are too many", given="4000000")
    provenance.save(output_dir)
    (output_dir / "result.json").write_text(json.dumps(dict(settings)))
    interrupted = {"state": "interrupted"} if settings["seed"] == 15 else {}
    return {"seed": settings["seed"]} | interrupted


def install() -> None:
    """Puts the stand-ins into a process of its own; tests in this one use monkeypatch."""
    targets.allow("tests.")
    config.ROLES.update(roles())
    api.start = start
