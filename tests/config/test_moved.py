"""Settings that an earlier rlx saved, in the words of this one."""

from __future__ import annotations

import copy

import pytest
from omegaconf import OmegaConf

import rlx
from rlx.config import moved, targets
from rlx.config.build import prepare, setting_hints

OLD_ADAM = {"_target_": "rlx.optimizers.Adam", "warmup_updates": 7, "decay_updates": None}


@pytest.mark.parametrize(("old", "new"), moved.MOVED.items())
def test_each_moved_target_is_a_class_of_today(old, new):
    cls, why = targets.resolve(new)
    assert cls is not None, why
    assert targets.resolve(old) == (None, f"moved; write {new}")


@pytest.mark.parametrize("target", [*moved.RENAMED, *moved.ADDED])
def test_renamed_and_added_settings_are_settings_of_today(target):
    cls, why = targets.resolve(target)
    assert cls is not None, why
    hints = setting_hints(cls)
    for old, new in moved.RENAMED.get(target, {}).items():
        assert new in hints
        assert old not in hints
    assert set(moved.ADDED.get(target, {})) <= set(hints)


def test_schedules_of_updates_became_schedules_of_gradient_steps():
    settings = {"agent": {"optimizer": OLD_ADAM, "unroll": 3}}
    assert moved.renewed(settings)["agent"] == {
        "optimizer": {
            "_target_": "rlx.agents.optimizers.Optimizer",
            "rule": "adam",
            "warmup_gradient_steps": 7,
            "decay_gradient_steps": None,
        },
        "unroll": 3,
    }


def test_a_networks_head_became_the_agents():
    head = {"_target_": "rlx.networks.heads.Dueling", "hidden": 3}
    saved = {"network": {"head": head, "stack": {}}, "agent": {"unroll": 3}}
    before = copy.deepcopy(saved)
    assert moved.renewed(saved) == {
        "network": {"stack": {}},
        "agent": {"unroll": 3, "head": {**head, "noise": None}},
    }
    assert saved == before


def test_settings_that_were_not_there_do_as_it_was_before():
    (target, added), *_ = moved.ADDED.items()
    saved = {"acting": {"_target_": target}}
    assert moved.renewed(saved)["acting"] == {"_target_": target, **added}
    name = next(iter(added))
    chosen = {"acting": {"_target_": target, name: "chosen"}}
    assert moved.renewed(chosen)["acting"][name] == "chosen"


@pytest.mark.parametrize(
    ("target", "switch"),
    [(target, switch) for target, (switches, _) in moved.IDLE.items() for switch in switches],
)
def test_half_of_a_decay_that_was_saved_is_none_at_all(target, switch):
    _, idle = moved.IDLE[target]
    always = {"_target_": target, **moved.ADDED.get(target, {})}
    saved = {**always, **dict.fromkeys(idle, 0.5)}
    assert moved.renewed({"a": saved})["a"] == saved  # all of it is a decay
    half = {**saved, switch: idle[switch]}
    assert moved.renewed({"a": half})["a"] == {**always, **idle}


def test_an_iqn_of_an_earlier_rlx_is_todays():
    saved = OmegaConf.to_container(rlx.compose(["agent=iqn"])["agent"])
    for name in ("acting_draws", "stratified"):  # which came later
        del saved[name]
    agent = moved.renewed({"agent": saved})["agent"]
    prepare(agent, "agent")
    assert (agent["acting_draws"], agent["stratified"]) == (True, False)


def test_todays_settings_stay_as_they_are():
    settings = {
        "seed": 1,
        "tags": ["a", {"b": None}],
        "agent": {"head": {"_target_": "rlx.networks.heads.Plain", "hidden": None, "noise": None}},
        "network": {"stack": {"observation": 4}},
        # Of settings that an earlier rlx did not have, and not as it did then.
        "acting": {"_target_": "rlx.acting.ray_pool.RayPool", "sync": True},
    }
    assert moved.renewed(settings) == settings
    assert moved.renewed(moved.renewed(settings)) == settings


def test_a_whole_run_of_an_earlier_rlx_keeps_its_programs():
    added = {
        **{"compile_cache": True, "hooks": [], "schedules": []},
        **{"init_from": None, "init_params": ["*"]},
    }
    assert moved.renewed({"total_env_steps": 5}) == {"total_env_steps": 5, **added}
    off = {"total_env_steps": 5, "compile_cache": False}
    assert moved.renewed(off) == {**added, **off}
