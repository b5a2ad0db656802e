"""From trained sparse networks to smaller ones: checked, stored, and run."""

from sparsejax.deploy.files import load, save
from sparsejax.deploy.final import finalize

__all__ = ("finalize", "load", "save")
