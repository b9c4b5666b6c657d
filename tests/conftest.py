"""Eight devices on one CPU and a compilation cache, for every test; before JAX is imported."""

import gc
import importlib.util
import os
import pathlib
import threading

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


@pytest.fixture(scope="module")
def compiled_once():
  """JAX's interpreter compiles a kernel for each thread of each block; here, once for them all."""
  import jax
  from jax._src.pallas.mosaic.interpret import thread_map

  lock, programs = threading.Lock(), {}

  def run_jaxpr(jaxpr, consts, *args):
    with lock:
      if id(jaxpr) not in programs:
        fn = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
        programs[id(jaxpr)] = jaxpr, fn.lower(consts, *args).compile()
    programs[id(jaxpr)][1](consts, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(thread_map, "_run_jaxpr", run_jaxpr)
    yield
