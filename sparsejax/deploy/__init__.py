"""From trained sparse networks to smaller ones: checked, compacted, stored, run, and reported.

`save`, `load`, `report` and sparse products need the extra `deploy`; the rest does not.
"""

from sparsejax.deploy import runtime
from sparsejax.deploy.compacted import Compacted
from sparsejax.deploy.compaction import compact
from sparsejax.deploy.compaction_report import CompactionReport, CompactionRow
from sparsejax.deploy.comparison import report
from sparsejax.deploy.comparison_report import Report, Variant
from sparsejax.deploy.files import load, save
from sparsejax.deploy.final import finalize
from sparsejax.deploy.translation import Translated, to_numpy

__all__ = (
  "Compacted",
  "CompactionReport",
  "CompactionRow",
  "Report",
  "Translated",
  "Variant",
  "compact",
  "finalize",
  "load",
  "report",
  "runtime",
  "save",
  "to_numpy",
)
