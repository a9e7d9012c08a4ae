"""Settings in groups that stand flat in a YAML, and what markers of settings tell others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import pytest

import rlx
from rlx.config import build as config
from rlx.config import targets
from rlx.config.build import build, plain, prepare, runtime_names, setting_hints
from rlx.interfaces import FromRecord, PrioritizedReplay, ReplayContext, TrainsOnce
from rlx.problems import ConfigError
from rlx.replay.dataset import Dataset
from rlx.replay.held import Begin, HeldRing, Keeping
from rlx.replay.online import Online
from rlx.replay.prioritized import Prioritized
from rlx.replay.process.client import ReplayProcess
from rlx.replay.uniform import Uniform
from rlx.training.assemble import make_replay
from rlx.training.rounds import blocks_of_a_round
from rlx.training.shares import share_of
from rlx.types import AloneOnly, Inline, OfTheRun, Range, Runtime
from tests.replay.replay_streams import carry_spec, rollout, row_spec, sequence_spec

HERE = "tests.config.test_inline"
CONTEXT = ReplayContext(
    sequence=sequence_spec(),
    row_spec=row_spec(),
    carry_spec=carry_spec(),
    lanes=2,
    env={},
    initial_priorities=None,
    on_policy=False,
    env_steps=0,
    seed=0,
    devices=(),
)


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setattr(targets, "_allowed", {"rlx.", "tests."})


@dataclass(frozen=True, kw_only=True)
class Wheel:
    spokes: Annotated[int, Range(ge=3)]
    rim: str | None

    def __post_init__(self) -> None:
        if self.spokes % 2:
            raise ValueError(f"spokes={self.spokes}: an even number is needed")


@dataclass(frozen=True, kw_only=True)
class Axle:
    wheel: Inline[Wheel]
    length: float


@dataclass(frozen=True, kw_only=True)
class Cart:
    axle: Inline[Axle]
    name: str
    owner: Runtime[str]
    painted: bool = False  # no setting: it has a default


def cart(**changes: Any) -> dict[str, Any]:
    return {
        "_target_": f"{HERE}.Cart",
        "spokes": 8,
        "rim": None,
        "length": 1,
        "name": "a",
    } | changes


def said(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cart(**changes), Cart, owner="me")
    return str(caught.value)


def test_settings_of_groups_in_groups_stand_flat():
    made = build(cart(), Cart, owner="me")
    wheel = Wheel(spokes=8, rim=None)
    assert made == Cart(axle=Axle(wheel=wheel, length=1.0), name="a", owner="me")
    assert isinstance(made.axle.length, float)
    assert list(setting_hints(Cart)) == ["spokes", "rim", "length", "name"]
    assert runtime_names(Cart) == ["owner"]


def test_what_is_wrong_in_a_group_is_said_of_the_flat_setting():
    assert said(spokes=2) == "Cart.spokes=2: accepted: an int >= 3"
    assert "Cart.spoke=8: no such setting; did you mean Cart.spokes?" in said(spoke=8)
    assert said(wheel={"spokes": 8}).startswith("Cart.wheel=")
    assert said(length="long") == "Cart.length=long: accepted: a float"
    assert said(spokes=7) == "Cart: spokes=7: an even number is needed"
    lacking = cart()
    del lacking["rim"]
    with pytest.raises(ConfigError, match=r"Cart\.rim: missing; give a string or null"):
        build(lacking, Cart, owner="me")


def test_a_prepared_call_gives_its_groups_and_theirs():
    call = prepare(cart(), Cart)
    assert call.gathered(Axle).settings["length"] == 1.0
    assert call.gathered(Wheel).settings["spokes"] == 8
    assert call.gathered(Cart) is None


@dataclass(frozen=True, kw_only=True)
class Twice:
    wheel: Inline[Wheel]
    spokes: int


@dataclass(frozen=True, kw_only=True)
class Perhaps:
    wheel: Inline[Wheel | Axle]


def test_groups_that_cannot_be_told_apart_are_refused():
    with pytest.raises(TypeError, match=r"Twice: spokes has \['spokes'\], which another has, too"):
        setting_hints(Twice)
    with pytest.raises(TypeError, match=r"Perhaps: wheel is Inline of .*; give one class"):
        setting_hints(Perhaps)


# --- a replay of one's own -----------------------------------------------------------------------


class Newest:
    """Draws the newest sequences; it has the settings that every replay has, and one more."""

    ratio: float | None
    min_sequences: int
    min_env_steps: int
    rings: Any
    capacity: int
    buffers: Any
    has_enough = False

    def __init__(
        self,
        *,
        begin: Inline[Begin],
        keeping: Inline[Keeping],
        newest: Annotated[int, Range(ge=1), OfTheRun()],
        secret: Annotated[str | None, AloneOnly()],
        context: Runtime[ReplayContext],
    ) -> None:
        self._held = HeldRing(keeping, context, min_sequences=begin.min_sequences)
        self.ratio, self.min_sequences = begin.ratio, begin.min_sequences
        self.min_env_steps, self._newest = begin.min_env_steps, newest
        ring: Any = self._held.ring
        self.rings, self.capacity = ring.rings, ring.capacity_rows
        self.buffers = ring.buffers

    def add(self, rollout: Any) -> None:
        self._held.add(rollout, lambda keys: np.ones(len(keys)))

    def sample(self, batch_size: int, *, buffers: Any = None) -> Any:
        ring: Any = self._held.ring
        keys = np.arange(ring.oldest_start, ring.oldest_start + ring.startable)[-self._newest :]
        return ring.read(self._held.rng.choice(keys, batch_size), buffers).evenly()

    startable = property(lambda self: self._held.ring.startable)
    rows = property(lambda self: self._held.ring.rows)
    env_steps = property(lambda self: self._held.ring.env_steps)
    nbytes = property(lambda self: self._held.ring.nbytes)

    def flush(self) -> None: ...
    def close(self) -> None:
        self._held.close()

    def stats(self) -> Any:
        return self._held.stats()

    def state(self) -> Any:
        return self._held.state()

    def restore(self, state: Any, blocks: Any) -> None:
        self._held.restore(state, blocks)


KEEPING = {
    "capacity": 80,
    "storage": "memory",
    "folder": None,
    "compress": "none",
    "gather_threads": 1,
    "shards": None,
    "where": "thread",
    "prefetch": 0,
    "record": None,
}
NEWEST = {"_target_": f"{HERE}.Newest", "newest": 4, "secret": None, **KEEPING}
NEWEST |= {"ratio": 1.0, "min_sequences": 1, "min_env_steps": 0}


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_replay_of_ones_own_lies_in_either_process(where):
    replay: Any = make_replay(NEWEST | {"where": where}, CONTEXT, 4)
    try:
        assert isinstance(replay, ReplayProcess) == (where == "process")
        replay.add(rollout([(k % 2, 0, k // 2) for k in range(20)], CONTEXT.sequence))
        keys = np.concatenate([replay.sample(4).keys for _ in range(8)])
        assert set(keys) <= set(range(replay.startable - 4, replay.startable))
        assert replay.env_steps == 40
    finally:
        replay.close()


def whole(**replay: Any) -> dict[str, Any]:
    settings = plain(rlx.compose(["acting.envs_per_actor=16"]))
    return settings | {"replay": NEWEST | replay}


def test_learner_processes_divide_and_refuse_what_groups_mark():
    own = share_of(whole(), 2)["replay"]
    assert (own["capacity"], own["newest"], own["gather_threads"]) == (40, 2, 1)
    with pytest.raises(ConfigError) as caught:
        share_of(whole(secret="x", record="somewhere") | {"deterministic": True}, 2)
    assert [problem.path for problem in caught.value.problems] == [
        "deterministic",
        "replay.record",
        "replay.secret",
    ]
    recorded = plain(rlx.compose(["replay=dataset", "replay.path=somewhere"]))
    with pytest.raises(ConfigError, match=r"replay\.path: needs learner\.processes=1"):
        share_of(recorded, 2)


@dataclass(frozen=True, kw_only=True)
class Window:
    length: Annotated[int, Range(ge=1), OfTheRun()]
    log: Annotated[str | None, AloneOnly()]


class Windowed(Newest):
    def __init__(self, *, window: Window, begin: Inline[Begin], keeping: Inline[Keeping]) -> None:
        raise AssertionError("only its settings are read")


def test_marks_count_in_nodes_within_nodes():
    window = {"_target_": f"{HERE}.Window", "length": 101, "log": None}
    node = {key: value for key, value in NEWEST.items() if key not in ("newest", "secret")}
    node |= {"_target_": f"{HERE}.Windowed", "window": window}
    settings = plain(rlx.compose(["acting.envs_per_actor=16"])) | {"replay": node}
    assert share_of(settings, 2)["replay"]["window"]["length"] == 51
    assert window["length"] == 101
    window["log"] = "somewhere"
    with pytest.raises(ConfigError, match=r"replay\.window\.log: needs learner\.processes=1"):
        share_of(settings, 2)


def test_a_process_that_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match="only a run starts a process for its replay"):
        rlx.make("replay=uniform", where="process", min_sequences=1, context=CONTEXT)
    on_device = NEWEST | {"where": "process", "storage": "device"}
    with pytest.raises(ConfigError, match=r"replay\.where=process: blocks on the learner's device"):
        make_replay(on_device, CONTEXT, 4)


def test_replays_say_what_they_are():
    assert [isinstance(cls, FromRecord) for cls in (Dataset, Online, Newest)] == [
        True,
        False,
        False,
    ]
    assert [isinstance(cls, TrainsOnce) for cls in (Online, Prioritized)] == [True, False]
    assert not isinstance(Uniform, PrioritizedReplay)
    assert isinstance(Prioritized, PrioritizedReplay)


def test_a_class_without_the_members_of_its_role_says_which():
    missing = r"Cart is no Replay: it has no .*min_sequences, nbytes, ratio, restore"
    with pytest.raises(ConfigError, match=missing):
        build(cart(), "replay", owner="me")
    assert targets.fits(Newest, config.load("rlx.interfaces.Replay"))


class Unmovable:
    """A replay with all that `Replay` asks for, and no buffers."""

    ratio: float | None
    min_sequences: int
    min_env_steps: int
    has_enough = False
    startable = rows = env_steps = nbytes = 0
    rings: Any
    add = sample = state = restore = flush = stats = close = Newest.flush

    def __init__(
        self, *, begin: Inline[Begin], keeping: Inline[Keeping], context: Runtime[ReplayContext]
    ) -> None: ...


def test_a_replay_that_no_process_can_serve_says_what_it_lacks():
    node = {key: value for key, value in NEWEST.items() if key not in ("newest", "secret")}
    node |= {"_target_": f"{HERE}.Unmovable"}
    assert isinstance(make_replay(node, CONTEXT, 4), Unmovable)
    lacking = (
        r"replay\.where=process: .*Unmovable cannot lie in another process: it has no buffers, "
    )
    with pytest.raises(ConfigError, match=lacking + "capacity"):
        make_replay(node | {"where": "process"}, CONTEXT, 4)


def test_rlx_make_takes_settings_of_groups_and_what_a_run_tells():
    replay = rlx.make("replay=uniform", capacity=100, min_sequences=1, context=CONTEXT)
    assert replay.capacity == 100
    with pytest.raises(ConfigError, match="capacty: no such setting; did you mean capacity"):
        rlx.make("replay=uniform", capacty=100, context=CONTEXT)


def test_importance_is_annealed_both_ways_or_not_at_all():
    small = {"capacity": 80, "min_sequences": 1, "initial_priority": "max"}
    settings = partial(rlx.make, "replay=prioritized", **small, context=CONTEXT)
    replay = settings(importance_exponent_final=1.0, anneal_env_steps=40)
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(10)], CONTEXT.sequence))
    assert replay.importance_exponent == pytest.approx(0.8)  # half of the way from 0.6
    with pytest.raises(ConfigError, match="both, or neither"):
        settings(anneal_env_steps=40)


def test_an_on_policy_agent_needs_a_replay_that_trains_once():
    settings = plain(rlx.compose([]))

    class OnPolicy:
        on_policy = True
        sequence = dataclasses.replace(CONTEXT.sequence, burn_in=0, unroll=2, stride=2)

    with pytest.raises(ConfigError, match="trains once on each row; choose replay=online"):
        blocks_of_a_round(settings, OnPolicy())  # type: ignore[arg-type]
