"""Settings for every test, and small parts that many tests build on."""

import atexit
import os
import shutil
import tempfile

# What one test has compiled no other one, nor a run that a test starts, compiles again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rlx-tests-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """The folder of a real multirun (tests/sweeps.py); not to be written into."""
    from tests import sweeps

    return sweeps.make(tmp_path_factory.mktemp("sweep"))
