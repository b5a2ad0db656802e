"""What works without the extra `deploy`."""

import subprocess
import sys
import textwrap


def test_without_the_extra_networks_are_compacted_and_files_and_sparse_products_ask_for_it():
  program = """
    import sys
    sys.modules["safetensors"] = sys.modules["scipy"] = None
    import jax.numpy as jnp, numpy as np, optax, sparsejax
    from sparsejax import deploy

    params = {"kernel": jnp.array([[1.0, 0.0], [2.0, 0.0]])}
    apply = lambda p, x: jnp.tanh(x @ p["kernel"])
    state = sparsejax.fixed_masks({"kernel": params["kernel"] != 0}).init(params)
    x = np.ones((1, 2), np.float32)
    print(deploy.compact(apply, deploy.finalize(params, state), x)(x).shape)
    print(deploy.to_numpy(apply, params, x, kind="dense")(x).shape)
    print(deploy.runtime.Network([deploy.runtime.Dense(np.eye(2))], x, kind="dense")(x))
    for call in (
      lambda: deploy.save("never-written", params),
      lambda: deploy.load(sys.executable),
      lambda: deploy.to_numpy(apply, params, x, kind="sparse"),
      lambda: deploy.report(apply, params, x),
    ):
      try:
        call()
      except ModuleNotFoundError as error:
        print(error)
  """
  command = [sys.executable, "-c", textwrap.dedent(program)]
  lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
  assert lines[:3] == ["(1, 2)", "(1, 2)", "[[1. 1.]]"]
  files, products = "sparse files need safetensors", "sparse products need SciPy"
  for line, start in zip(lines[3:], (files, files, products, products), strict=True):
    assert line.startswith(start) and "sparsejax[deploy]" in line
