"""Eight devices on one CPU and a compilation cache, for every test; before JAX is imported."""

import gc
import os
import pathlib

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(autouse=True, scope="module")
def forgotten():
  """Lets go of a file's compiled programs, which are gigabytes by the end of the suite."""
  import jax

  yield
  jax.clear_caches()
  gc.collect()
