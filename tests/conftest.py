"""Settings for every test, and small parts that many tests build on."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What one test has compiled no other one, nor a run that a test starts, compiles again. The workers
# of pytest-xdist have the folder from the process that starts them.
if not os.environ.get("RLX_COMPILED"):
    os.environ["RLX_COMPILED"] = tempfile.mkdtemp(prefix="rlx-")
    atexit.register(shutil.rmtree, os.environ["RLX_COMPILED"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["RLX_COMPILED"]
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun with `&`: Ctrl-C is tested, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# With Ray, or with bars on speed: one after the other, in one of pytest-xdist's workers.
IN_TURN = {
    *("test_ray_pool", "test_ray_token", "test_rounds", "test_ray_run", "test_learner_group"),
    *("test_asynchronous", "test_bench", "04_scale_out"),
}
GROUP = "in turn"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in IN_TURN:
            item.add_marker(pytest.mark.xdist_group(GROUP))


@pytest.fixture(autouse=True)
def _ray_is_used_in_turn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts Ray beside another one: `address=auto` of one finds the other's."""
    if any(mark.args == (GROUP,) for mark in request.node.iter_markers("xdist_group")):
        return

    def refused(*args: object, **kwargs: object) -> None:
        pytest.fail(f"a test with Ray needs @pytest.mark.xdist_group({GROUP!r})")

    monkeypatch.setattr("ray.init", refused)


# Every compiled program holds some memory maps, and a process may have 65,530 (Linux's default):
# beyond it XLA aborts, and with it the worker of pytest-xdist.
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Forgets compiled programs where they have become many; the cache on the disk has them."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """Saves compiling time in modules each of whose programs runs only once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """The folder of a real multirun (tests/multirun.py); not to be written into."""
    from tests import multirun

    return multirun.make(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be looked into, which root's tests cannot make by its mode."""
    folder, real = tmp_path / "closed", Path.is_file
    folder.mkdir()

    def is_file(path: Path) -> bool:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    return folder


SMALL = [
    *("agent.burn_in=2", "agent.unroll=4", "agent.n_step=2", "agent.stride=2"),
    *("agent.block_rows=2", "learner.batch_size=4"),
    *("replay.min_sequences=4", "replay.capacity=2000", "replay.ratio=8"),
    *("acting.envs_per_actor=4", "acting.env_steps_per_request=8", "total_env_steps=500"),
    *("evaluation.final_episodes=10", "evaluation.epsilon=0.1", "checkpoint.every_env_steps=200"),
    *("logging.console=off", "logging.tensorboard=false"),
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run of the default task; copy it to write into it."""
    import rlx

    folder = tmp_path_factory.mktemp("runs") / "trained"
    rlx.run(rlx.compose(SMALL), folder)
    return folder
