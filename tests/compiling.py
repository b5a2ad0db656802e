"""Options of the compiler, as `jax.jit` and `compile` take them."""

# tests/conftest.py lets XLA do less than it does by default. What a test says about compiled
# programs, their memory and their bits, is to be true of those that users get.
AS_USERS = {
  "xla_backend_optimization_level": 3,
  "xla_cpu_use_fusion_emitters": True,
  "xla_llvm_disable_expensive_passes": False,
}
