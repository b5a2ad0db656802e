"""Global settings only: eight devices, one compilation of a program, no clock for examples."""

import atexit
import os
import shutil
import tempfile

import compiling
import hypothesis

# All of these have to be set before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
# What the environment says counts last: XLA_FLAGS="--xla_backend_optimization_level=3" makes all
# tests compile nearly as users do.
os.environ["XLA_FLAGS"] = " ".join(
  [
    "--xla_force_host_platform_device_count=8",
    *compiling.as_flags(compiling.IN_TESTS),
    os.environ.get("XLA_FLAGS", ""),
  ]
).strip()
# Different tests compile the same programs: they share them for as long as the tests run.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparsejax-tests-")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# The first example of a property pays for its compilation, so no example can have a deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
