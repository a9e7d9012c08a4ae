"""Opens one gymnasium environment, in the process of its lane, or says in a line why not."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from rlx.envs import wrapping
from rlx.envs.observations import Source, nearest
from rlx.envs.one_lane import OneLane
from rlx.envs.true_episodes import Beneath
from rlx.problems import EnvironmentFailed


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Opens one environment; it travels to the process of its lane."""

    env_id: str
    kwargs: dict[str, Any]
    wrappers: tuple[wrapping.Wrapping, ...]
    limit: int | None  # env steps of an episode, around the wrappers

    def open(self) -> tuple[Any, Beneath | None]:
        """(the environment in its wrappers, what counts beneath them), None without wrappers."""
        env = gymnasium.make(self.env_id, **self.kwargs)
        if not self.wrappers:
            return env, None
        beneath = Beneath(env)
        try:
            whole = wrapping.wrapped(beneath, self.wrappers)
        except ValueError:
            env.close()
            raise
        if self.limit is not None:
            whole = gymnasium.wrappers.TimeLimit(whole, self.limit)
        return whole, beneath


def open_lane(how: Opening, lane: int, sources: Sequence[Source], *, restarts: int) -> Any:
    """One environment of a vector, in whatever process it is.

    restarts: so often in a row it is opened anew where it fails.
    """
    if problems := id_problems(how.env_id, sent=multiprocessing.parent_process() is not None):
        raise EnvironmentFailed(how.env_id, problems[0], lane)
    env, beneath = how.open()
    return OneLane(
        env,
        env_id=how.env_id,
        lane=lane,
        sources=sources,
        beneath=beneath,
        reopen=how.open,
        restarts=restarts,
    )


def id_problems(env_id: str, *, sent: bool) -> list[str]:
    """None for a registered id, or 'module:id' after importing that module.

    sent: whether another process gave the id, where it was registered.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except (ImportError, ValueError) as error:  # the latter: an empty name
        return [f"env.id={env_id!r}: {error}; install the package that registers {name!r}"]
    if name in gymnasium.registry:
        return []
    if sent and not module:
        return [
            f"env.id={env_id!r} was registered where the run was started, not in this process of "
            f"its actors; {by_module(name)}"
        ]
    return [
        f"env.id={env_id!r} is not registered with gymnasium; "
        f"{nearest(name, gymnasium.registry)} ('module:id' imports the module that registers it)"
    ]


def by_module(name: str) -> str:
    return f"give env.id=module:{name}, with the module that registers it"


def made(make: Callable[[], Any], env_id: str) -> Any:
    """Calls `make`; raises one line that names the id if something (a package) is missing."""
    try:
        return make()
    except EnvironmentFailed:
        raise
    except (Exception, SystemExit) as error:  # it is anybody's code
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"env.id={env_id!r} does not work here: {line}") from error
