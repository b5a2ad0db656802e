"""How much the compiler does: options of `jax.jit` and `compile`, and those of all tests."""

import importlib.metadata

# JAX 0.11 has no other emitters any more.
_HAS_ELDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")

# Most of the time of the tests is compilation, so XLA does less of it: the elder and cheaper
# emitters, and LLVM at level 1. Level 0 is cheaper still, but has no fused multiply-add, by which
# programs that are to agree bit for bit would differ.
IN_TESTS = {
  "xla_backend_optimization_level": 1,
  "xla_cpu_parallel_codegen_split_count": 1,
  "xla_llvm_disable_expensive_passes": True,
}

# What a test says about compiled programs, their memory and their bits, is to be true of those that
# users get.
AS_USERS = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}

if _HAS_ELDER_EMITTERS:
  IN_TESTS["xla_cpu_use_fusion_emitters"] = False
  AS_USERS["xla_cpu_use_fusion_emitters"] = True


def as_flags(options: dict[str, int | bool]) -> list[str]:
  """The options as words of XLA_FLAGS."""
  return [f"--{name}={str(value).lower()}" for name, value in options.items()]
