"""Eight devices on one CPU and a compilation cache, for every test; before JAX is imported."""

import gc
import importlib.util
import os
import pathlib

import pytest

# Most of a test's time goes into compiling small programs: a quarter less without optimisation of
# the machine code, which changes neither what XLA fuses nor how much memory it takes.
os.environ["XLA_FLAGS"] = " ".join([
  "--xla_force_host_platform_device_count=8",
  f"--xla_backend_optimization_level={os.environ.get('OPTIMISE', '0')}",
])  # fmt: skip
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(autouse=True)
def compiler(request):
  """Skips what wants libtpu where it is absent; `make test-tpu` installs it."""
  if request.node.get_closest_marker("libtpu") and not importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is absent")


@pytest.fixture(autouse=True, scope="module")
def forgotten():
  """Lets go of a file's compiled programs, which are gigabytes by the end of the suite."""
  import jax

  yield
  jax.clear_caches()
  gc.collect()
