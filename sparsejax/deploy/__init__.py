"""From trained sparse networks to smaller ones: checked, compacted, stored, and run."""

from sparsejax.deploy.compaction import Compacted, Report, Row, compact
from sparsejax.deploy.files import load, save
from sparsejax.deploy.final import finalize

__all__ = ("Compacted", "Report", "Row", "compact", "finalize", "load", "save")
