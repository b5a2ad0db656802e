import pathlib
import re

import sparsejax
from experiments import reproduce

ROOT = pathlib.Path(sparsejax.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_prunes_what_it_says(capsys):
  (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  exec(compile(code, "README.md", "exec"), {})
  pool = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("prunable"))
  assert pool.split()[1:4] == ["7,840", "784", "90.00%"]


def test_the_table_is_that_of_the_results():
  for table in reproduce.TABLES:
    made = (reproduce.RESULTS / table / "table.md").read_text()
    between = README.split(f"<!-- table of experiments/results/{table} -->")[1]
    assert between.split("<!-- end of table -->")[0].strip() == made.strip()


def test_every_public_name_is_exported_in_alphabetical_order():
  assert list(sparsejax.__all__) == sorted(sparsejax.__all__)
  assert all(hasattr(sparsejax, name) for name in sparsejax.__all__)
