"""Configurations: what is accepted, and what exactly is said of everything else."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

import rlx
from rlx import api
from rlx.config import build as config
from rlx.config import composing, moved, paths, targets
from rlx.config.hints import matches
from rlx.problems import ConfigError, Problem
from rlx.types import Range
from tests import standins

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def conf(tmp_path, monkeypatch):
    folder = standins.write_conf(tmp_path / "conf")
    monkeypatch.setattr(paths, "config_dir", lambda: folder)
    monkeypatch.setattr(targets, "_allowed", {"rlx.", "tests."})
    monkeypatch.setattr(config, "ROLES", standins.roles())
    monkeypatch.setattr(composing, "paths", paths)
    monkeypatch.setattr(api, "ROLES", config.ROLES)
    monkeypatch.setattr(api, "start", standins.start)
    monkeypatch.chdir(tmp_path)
    return folder


def lines(*overrides: str) -> list[str]:
    """The lines that composing and checking say of these overrides."""
    try:
        config.check(rlx.compose(overrides))
    except ConfigError as error:
        return str(error).splitlines()
    return []


# --- accepted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["acting=ray_pool", "acting.instances=3"],
        ["experiment=long"],
        ["agent=iqn"],
        ["agent.discount=1", "agent.period=5"],
        ["+agent.stack.image=4", "agent.layers=[8]"],
        ["+env.options.repeat=4"],
        ["agent.optimizer.max_norm=null"],
        ["tags=[a,b]", "resume=auto", "stop_after_s=60", "total_env_steps=1_000_000"],
    ],
)
def test_good_overrides_pass(overrides):
    assert lines(*overrides) == []


def test_an_experiment_wins_over_the_root_file_and_the_command_line_over_both():
    assert rlx.compose(["experiment=long"]).seed == 7
    assert rlx.compose(["experiment=long", "seed=3"]).seed == 3
    assert rlx.compose(["experiment=long"]).agent.unroll == 80


# --- refused, with the exact line ----------------------------------------------------------------

AGENT = "(conf/agent/r2d2.yaml)"
LINE = "(command line)"
REFUSED = {
    "acting.instances=three": f"acting.instances=three {LINE}: accepted: an int >= 1",
    "acting.instances=0": f"acting.instances=0 {LINE}: accepted: an int >= 1",
    "acting.instances=1.5": f"acting.instances=1.5 {LINE}: accepted: an int >= 1",
    "acting.instances=true": f"acting.instances=true {LINE}: accepted: an int >= 1",
    "acting.instances=null": f"acting.instances=null {LINE}: accepted: an int >= 1",
    "acting.instances=???": f"acting.instances=??? {LINE}: missing; give an int >= 1",
    "total_env_steps=1e6": (
        f"total_env_steps=1000000.0 {LINE}: accepted: an int >= 1; write 1_000_000"
    ),
    "stop_after_updates=2e3": (
        f"stop_after_updates=2000.0 {LINE}: accepted: an int >= 1 or null; write 2_000"
    ),
    "seed=-1": f"seed=-1 {LINE}: accepted: an int >= 0",
    "seed=1.0": f"seed=1.0 {LINE}: accepted: an int >= 0; write 1",
    "stop_after_s=0": f"stop_after_s=0 {LINE}: accepted: a float > 0 or null",
    "deterministic=1": f"deterministic=1 {LINE}: accepted: true or false",
    "tags=a": f"tags=a {LINE}: accepted: a list, each a string",
    "tags=[1]": f"tags.0=1 {LINE}: accepted: a string; strings of digits are quoted: \"'1'\"",
    "tags=3": (
        f"tags=3 {LINE}: accepted: a list, each a string; strings of digits are quoted: \"['3']\""
    ),
    "resume=3": (
        f"resume=3 {LINE}: accepted: a string or null; strings of digits are quoted: \"'3'\""
    ),
    "agent.discount=2": f"agent.discount=2 {LINE}: accepted: a float >= 0 and <= 1",
    "agent.discount=nan": f"agent.discount=nan {LINE}: accepted: a float >= 0 and <= 1",
    "agent.discount=true": f"agent.discount=true {LINE}: accepted: a float >= 0 and <= 1",
    "agent.double=yes": f"agent.double=yes {LINE}: accepted: true or false",
    "agent.period=0": f"agent.period=0 {LINE}: accepted: an int >= 1 or null",
    "agent.dtype=flot32": (
        f"agent.dtype=flot32 {LINE}: accepted: float32 or bfloat16; did you mean float32?"
    ),
    "agent.layers=[8,0]": f"agent.layers.1=0 {LINE}: accepted: an int >= 1",
    "agent.layers=8": f"agent.layers=8 {LINE}: accepted: a list, each an int >= 1",
    "env.frames=[1]": f"env.frames=[1] {LINE}: accepted: a list, each an int, then an int",
    "+agent.stack.image=0": f"agent.stack.image=0 {LINE}: accepted: an int >= 1",
    "agent.optimizer.learning_rate.rate=5": (
        f"agent.optimizer.learning_rate.rate=5 {LINE}: accepted: a float > 0 and < 1"
    ),
    "~agent.optimizer._target_": (
        "agent.optimizer={'max_norm': 40, 'learning_rate': {'_target_': 'tests.standins.Constant', "
        "'rate': 0.001}} (conf/agent/r2d2.yaml): accepted: settings of Adam or settings of SGD; "
        "its _target_ says which class: tests.standins.Adam or tests.standins.SGD"
    ),
    "agent.optimizer=adam": (
        f"agent.optimizer=adam {LINE}: accepted: settings of Adam or settings of SGD"
    ),
    "agent.optimizer.learning_rate=0.1": (
        f"agent.optimizer.learning_rate=0.1 {LINE}: accepted: settings with the _target_ of "
        "Schedule"
    ),
    "+acting.instnaces=3": (
        f"acting.instnaces=3 {LINE}: no such setting; did you mean acting.instances?"
    ),
    "+acting.agent=3": (
        f"acting.agent=3 {LINE}: comes from the run, not from a configuration; remove it"
    ),
    "+acting.name=x": (
        f"acting.name=x {LINE}: no such setting; accepted: envs_per_actor, instances"
    ),
    "+sede=3": f"sede=3 {LINE}: no such setting; did you mean seed?",
    "+acting._partial_=true": (
        f"acting._partial_=true {LINE}: no such setting; accepted: envs_per_actor, instances"
    ),
    "~acting.instances": f"acting.instances {LINE}: missing; give an int >= 1",
    "~replay": "replay: missing; choose one with replay=NAME",
    "env.id=Pnog": (f"env.id {LINE}: env.id=Pnog is unknown; accepted: CartPole, Pong"),
    "acting.instnaces=3": (
        f"acting.instnaces=3 {LINE}: no such setting; did you mean acting.instances?"
    ),
    "actng.instances=3": (
        f"actng.instances=3 {LINE}: no such key or group; did you mean acting.instances?"
    ),
    "actng=local": f"actng=local {LINE}: no such key or group; did you mean acting?",
    "acting=ray_pol": (
        f"acting=ray_pol {LINE}: no such option; did you mean acting=ray_pool? accepted: "
        "default, local, ray_pool"
    ),
    "seed=0,1": (
        f"seed=0,1 {LINE}: is several values; write -m first for one run of each, or [a,b] for "
        "a list"
    ),
}


def test_a_group_cannot_be_null():
    (line,) = lines("agent=null")
    assert line == "agent=null (command line): no such option; accepted: default, iqn, r2d2"


@pytest.mark.parametrize("override", REFUSED)
def test_one_bad_override_gives_one_exact_line(override):
    assert lines(override) == [REFUSED[override]]


def test_a_limit_counts_where_it_says_so():
    for limit, fits, does_not in (
        (Range(ge=1), (1, 2), (0,)),
        (Range(gt=1), (2,), (0, 1)),
        (Range(le=1), (0, 1), (2,)),
        (Range(lt=1), (0,), (1, 2)),
        (Range(ge=0, lt=1), (0,), (-1, 1)),
    ):
        assert all(matches(value, int, [limit]) for value in fits), limit
        assert not any(matches(value, int, [limit]) for value in does_not), limit


@pytest.mark.parametrize("text", ["seed=[1", "seed", "a b=3"])
def test_bad_syntax_names_the_override(text):
    (line,) = lines(text)
    assert line.startswith(f"{text} {LINE}: cannot be read (")
    assert line.endswith("write key=value, with quotes around special characters")


def test_all_problems_come_at_once_with_their_files(conf):
    (conf / "acting" / "local.yaml").write_text("_target_: tests.standins.Pool\ninstnaces: 3\n")
    found = lines("seed=-1", "agent.unroll=x", "experiment=long", "+env.colour=red")
    assert found == [
        f"seed=-1 {LINE}: accepted: an int >= 0",
        f"env.colour=red {LINE}: no such setting; accepted: frames, id, options",
        f"agent.unroll=x {LINE}: accepted: an int >= 1",
        "acting.instnaces=3 (conf/acting/local.yaml): no such setting; did you mean "
        "acting.instances?",
        "acting.instances (conf/acting/local.yaml): missing; give an int >= 1",
        "acting.envs_per_actor (conf/acting/local.yaml): missing; give an int",
    ]


def test_all_bad_overrides_come_at_once():
    found = lines("acting=ray_pol", "agent.unrol=3", "seed=[1", "env=cartpole", "sede=1")
    starts = [line.split(" (")[0] for line in found]
    assert starts == ["seed=[1", "acting=ray_pol", "agent.unrol=3", "sede=1"]


def test_an_experiments_value_is_named_after_its_file(conf):
    text = "# @package _global_\nseed: -3\nacting:\n  instances: 0\n"
    (conf / "experiment" / "bad.yaml").write_text(text)
    assert lines("experiment=bad") == [
        "seed=-3 (conf/experiment/bad.yaml): accepted: an int >= 0",
        "acting.instances=0 (conf/experiment/bad.yaml): accepted: an int >= 1",
    ]


def test_an_experiments_agent_values_do_not_leak_into_another_agent():
    assert lines("experiment=long", "agent=iqn") == [
        "agent (conf/experiment/long.yaml): sets values for agent=r2d2, but this run has "
        "agent=iqn; choose one"
    ]
    (line,) = lines("experiment=forgetful")
    assert line.startswith("agent (conf/experiment/forgetful.yaml): sets agent values and must")


def test_an_experiment_with_a_misspelt_option_is_one_line():
    (line,) = lines("experiment=broken")
    assert "ray_pol" in line
    assert "ray_pool" in line


def test_broken_yaml_and_interpolations_are_one_line(conf):
    (line,) = lines("seed=${nowhere}")
    assert line.startswith(f"seed {LINE}: ")
    assert "nowhere" in line
    (conf / "acting" / "local.yaml").write_text("a: [1\nb: 2")
    (line,) = lines()
    assert "local.yaml" in line


def test_a_users_own_folder_is_searched_and_named(tmp_path):
    mine = tmp_path / "my conf" / "acting"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("defaults: [ray_pool, _self_]\ninstances: 0\n")
    cfg = rlx.compose(["acting=mine"], extra_dir=tmp_path / "my conf")
    assert cfg.acting.envs_per_actor == 32
    with pytest.raises(ConfigError, match=r"acting\.instances=0: accepted: an int >= 1"):
        rlx.make("acting=mine", extra_dir=tmp_path / "my conf")
    with pytest.raises(ConfigError) as error:
        config.check(cfg)
    assert str(error.value).startswith(f"acting.instances=0 ({mine}/mine.yaml): ")
    with pytest.raises(ConfigError, match="no such folder"):
        rlx.compose(extra_dir=tmp_path / "nowhere")


def test_config_errors_travel_between_processes():
    error = ConfigError([Problem(path="a", says="b", given="1", source="c")])
    assert str(pickle.loads(pickle.dumps(error))) == "a=1 (c): b"


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), moved.MOVED.items())
def test_settings_of_an_earlier_rlx_name_todays_classes(old, new):
    assert targets.resolve(new)[1] == ""
    assert targets.full_name(targets.resolve(new)[0]) == new
    saved = {"a": {"_target_": old, "rate": 1}, "b": [{"_target_": old}], "c": 3, "d": None}
    before = copy.deepcopy(saved)
    added = moved.ADDED.get(new, {})
    assert moved.renewed(saved) == {
        "a": {"_target_": new, "rate": 1, **added},
        "b": [{"_target_": new, **added}],
        "c": 3,
        "d": None,
    }
    assert saved == before
    assert targets.resolve(old) == (None, f"moved; write {new}")  # in a user's own YAML


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("os.system", "not allowed; accepted: a public class under rlx. or tests."),
        ("pathlib.Path", "not allowed; "),
        ("flax.linen.kw_only_dataclasses.inspect.os.system", "not allowed; "),
        ("rlx.runs.provenance.subprocess.Popen", "cannot be imported ("),
        ("rlx.config.build.os.system", "cannot be imported ("),
        ("rlx.config.build.typing.Any", "cannot be imported ("),
        ("rlx.config.build.OmegaConf", "not allowed: it is omegaconf.omegaconf.OmegaConf; "),
        ("rlx.runs.provenance.Path", f"not allowed: it is {targets.full_name(Path)}; "),
        ("rlx.runs.provenance.subprocess", "not allowed: it is subprocess; "),
        ("rlx.runs.provenance.save", "not allowed: it is rlx.runs.provenance.save; "),
        ("rlx.compose", "no such class; "),
        ("rlx..config.Root", "cannot be imported ("),
        ("rlx.", "no such class; "),
        ("rlx", "not allowed; "),
        ("rlxx.Agent", "not allowed; "),
        ("tests.standins.SHADOW", f"not allowed: it is {targets.full_name(Path)}; "),
        ("tests.standins.a_function", "not allowed: it is tests.standins.a_function; "),
        ("tests.standins._Private", "not allowed: it is tests.standins._Private; "),
        ("tests.standins.Agent.__init__", "cannot be imported ("),
        ("tests.standins.Agentt", "no such class; did you mean tests.standins.Agent?"),
        ("rlx.confg.Agent", "cannot be imported (No module named 'rlx.confg'); did you mean rlx."),
        ("tests.standins.Part", "tests.standins.Part is no AgentRole: it has no unroll"),
        (
            "tests.standins.AgentRole",
            "tests.standins.AgentRole is no AgentRole: it is only an interface",
        ),
        ("rlx.config.build.Root", "rlx.config.build.Root is no AgentRole: it has no unroll"),
        (3, "not allowed; "),
    ],
)
def test_a_target_counts_by_what_it_resolves_to(target, says):
    tree = config.plain(rlx.compose())
    tree["agent"] = {"_target_": target}
    with pytest.raises(ConfigError) as error:
        config.check(tree)
    (problem,) = error.value.problems
    assert problem.path == "agent._target_"
    assert problem.says.startswith(says)


def test_nothing_outside_the_allowed_packages_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("class Agent: unroll = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("evil.Agent", "rlx.evil.Agent"):
        with pytest.raises(ConfigError):
            config.build({"_target_": target}, "agent")
    assert "evil" not in sys.modules
    targets.allow("evil.")
    config.build({"_target_": "evil.Agent"}, "agent")
    assert "evil" in sys.modules
    with pytest.raises(ValueError, match="takes a package and a dot"):
        rlx.allow("evil")


def test_a_nested_target_must_be_what_the_parameter_asks_for():
    tree = config.plain(rlx.compose())
    tree["agent"] = {**tree["agent"], "optimizer": {"_target_": "tests.standins.Part", "size": 1}}
    with pytest.raises(ConfigError) as error:
        config.check(tree)
    assert str(error.value) == (
        "agent.optimizer._target_=tests.standins.Part: tests.standins.Part is no Adam or SGD"
    )
    tree["agent"]["optimizer"] = {"_target_": "pathlib.Path"}
    with pytest.raises(ConfigError, match=r"optimizer\._target_=pathlib\.Path: not"):
        config.check(tree)


def test_an_installed_package_is_allowed_by_its_entry_point(tmp_path):
    (tmp_path / "pkgx.py").write_text("class Agent: unroll = 1\n")
    info = tmp_path / "pkgx-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pkgx\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlx.allow]\npkgx = pkgx\n")
    code = "from rlx.config import targets; print(targets.resolve('pkgx.Agent'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": standins.search_path(tmp_path, HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(<class 'pkgx.Agent'>, '')"


# --- build and make ------------------------------------------------------------------------------


def test_build_converts_nests_and_takes_what_a_class_declares_from_the_run():
    agent = config.build(rlx.compose(["agent.discount=1"]).agent, "agent", spec="s", other=3)
    assert (agent.spec, agent.layers, agent.optimizer.learning_rate.rate) == ("s", (64, 64), 1e-3)
    assert isinstance(agent.discount, float)
    assert isinstance(agent.optimizer.max_norm, float)
    with pytest.raises(TypeError, match=r"agent: Agent needs \['spec'\] from the run"):
        config.build(rlx.compose().agent, "agent")


def test_optional_runtime_parameters_keep_their_default():
    assert config.build(rlx.compose().acting, "acting", agent=1).chain == 0
    assert config.build(rlx.compose().acting, "acting", agent=1, chain=4).chain == 4


def test_a_constructors_value_error_is_a_problem_of_the_settings():
    node = rlx.compose(["acting.instances=1000"]).acting
    with pytest.raises(ConfigError, match="acting: instances=1000 is too many"):
        config.build(node, "acting", agent=1)


def test_building_writes_nothing_into_the_configuration():
    cfg = rlx.compose()
    before = OmegaConf.to_yaml(cfg)
    config.check(cfg)
    config.build(cfg.agent, "agent", spec="s")
    assert OmegaConf.to_yaml(cfg) == before


def test_make_builds_by_name():
    agent = rlx.make("agent=iqn", unroll=4, optimizer={"max_norm": 7}, spec="s")
    assert (agent.unroll, agent.optimizer.max_norm, agent.optimizer.learning_rate.rate) == (
        *(4, 7.0),
        1e-3,
    )
    with pytest.raises(ConfigError, match="unrol: no such setting; did you mean unroll"):
        rlx.make("agent=r2d2", unrol=4)
    with pytest.raises(ConfigError, match="agnt: no such group; did you mean agent"):
        rlx.make("agnt=r2d2")
    with pytest.raises(ConfigError, match=r"agent\.unroll=0: accepted: an int >= 1"):
        rlx.make("agent=r2d2", unroll=0, spec="s")


def test_linen_modules_are_checked_like_dataclasses(tmp_path, monkeypatch):
    source = (
        "import flax.linen as nn\nfrom typing import Annotated\nfrom rlx.types import Range\n"
        "class Torso(nn.Module, kw_only=True):\n    size: Annotated[int, Range(ge=1)]\n"
    )
    (tmp_path / "linens.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    targets.allow("linens.")
    assert config.build({"_target_": "linens.Torso", "size": 3}, "network").size == 3
    with pytest.raises(ConfigError) as error:
        config.build({"_target_": "linens.Torso", "size": 0, "parent": None}, "network")
    assert str(error.value).splitlines() == [
        "network.parent=null: no such setting; accepted: size",
        "network.size=0: accepted: an int >= 1",
    ]


# --- compose anywhere ----------------------------------------------------------------------------


def test_compose_works_inside_a_users_own_initialize(conf):
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        assert rlx.compose(["seed=5"]).seed == 5
        assert hydra.compose("config", ["seed=6"]).seed == 6
        with pytest.raises(ConfigError):
            rlx.compose(["sede=5"])
        assert hydra.compose("config", ["seed=7"]).seed == 7


def test_compose_works_in_threads():
    seeds: list[int] = []

    def work(seed: int) -> None:
        seeds.append(rlx.compose([f"seed={seed}"]).seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(seeds) == list(range(6))


# --- run and load --------------------------------------------------------------------------------


def test_run_saves_what_is_needed_to_know_it_again(tmp_path):
    assert rlx.run(rlx.compose(["seed=3"]), tmp_path / "run") == {"seed": 3}
    record = json.loads((tmp_path / "run" / "env.json").read_text())
    assert record["versions"]["numpy"]
    assert {"python", "platform", "git"} <= set(record)
    loaded = rlx.load(tmp_path / "run")
    assert (loaded.cfg.seed, loaded.output_dir) == (3, tmp_path / "run")


def test_run_makes_its_own_folder():
    rlx.run(rlx.compose())
    assert len(list(Path("outputs").glob("*/*/result.json"))) == 1


def test_run_refuses_a_used_folder_and_one_that_cannot_be(tmp_path):
    rlx.run(rlx.compose(), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already; continue it with resume="):
        rlx.run(rlx.compose(), tmp_path / "run")
    rlx.run(rlx.compose(["resume=auto"]), tmp_path / "run")
    assert (tmp_path / "run" / "env-1.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        rlx.run(rlx.compose(), tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="no run is there"):
        rlx.run(rlx.compose(["resume=nowhere"]))


def test_a_refused_run_leaves_its_folder_free_and_its_configuration_behind(tmp_path):
    with pytest.raises(ConfigError, match="28 GB are too many"):
        rlx.run(rlx.compose(["seed=99"]), tmp_path / "run")
    rlx.run(rlx.compose(["seed=3"]), tmp_path / "run")
    assert rlx.load(tmp_path / "run").cfg.seed == 3


def test_two_runs_are_never_in_one_folder_at_once(tmp_path, monkeypatch):
    def start_again(settings, folder):
        with pytest.raises(ConfigError, match="another process is at work in it"):
            rlx.run(rlx.compose(["resume=auto"]), folder)
        return {}

    monkeypatch.setattr(api, "start", start_again)
    rlx.run(rlx.compose(), tmp_path / "run")


def test_run_checks_first(tmp_path):
    with pytest.raises(ConfigError, match="seed=-1"):
        rlx.run(rlx.compose(["seed=-1"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_runs_configuration_is_only_data(tmp_path):
    rlx.run(rlx.compose(), tmp_path / "run")
    saved = tmp_path / "run" / ".hydra" / "config.yaml"
    tree = yaml.safe_load(saved.read_text())
    tree["agent"] = {"_target_": "os.system", "command": f"touch {tmp_path}/hacked"}
    saved.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"agent\._target_=os\.system .*config.yaml\): not allow"):
        rlx.load(tmp_path / "run")
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(ConfigError, match="no run is there"):
        rlx.load(tmp_path / "nowhere")


def test_the_real_root_file_lists_every_root_key_and_group():
    tree = yaml.safe_load((HERE.parent / "conf" / "config.yaml").read_text())
    assert set(tree) - {"defaults", "hydra"} == {f.name for f in dataclasses.fields(config.Root)}
    groups = [next(iter(entry)) for entry in tree["defaults"] if isinstance(entry, dict)]
    assert set(standins.roles()) <= set(groups)
    assert groups.index("replay") < groups.index("agent")
    assert tree["defaults"].index("_self_") < tree["defaults"].index({"experiment": None})
