import pathlib
import re

import numpy as np

import sparsejax
from experiments.models import MODELS

ROOT = pathlib.Path(sparsejax.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run_one_after_the_other_and_prune_what_they_say(capsys):
  names = {}
  for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    exec(compile(code, "README.md", "exec"), names)
    assert np.all(np.isfinite(names["params"]["kernel"]))
  assert round(float(sparsejax.sparsity(names["masks"])), 6) == 0.9
  pool = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("prunable"))
  assert pool.split()[1:4] == ["7,840", "784", "90.00%"]


def test_tables_are_those_of_the_results():
  tables = re.findall(r"<!-- table of (.*?) -->\n(.*?)<!-- end of table -->", README, re.DOTALL)
  assert tables
  for path, table in tables:
    assert table.strip() == (ROOT / path).read_text().strip()


def test_excerpts_are_those_of_the_results():
  """Of a report: the table of its networks, and what it concludes."""
  excerpts = re.findall(
    r"<!-- excerpt of (.*?) -->\n(.*?)<!-- end of excerpt -->", README, re.DOTALL
  )
  assert excerpts
  for path, excerpt in excerpts:
    assert excerpt.strip() and excerpt.strip() in (ROOT / path).read_text()


def test_as_many_networks_are_there_as_it_says():
  assert f"in Flax Linen, {len(MODELS)} of them" in README


def test_every_public_name_is_exported_in_alphabetical_order():
  assert list(sparsejax.__all__) == sorted(sparsejax.__all__)
  assert all(hasattr(sparsejax, name) for name in sparsejax.__all__)
