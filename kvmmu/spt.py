"""The tree of SPTEs, under its documented name; see `kvmmu.report.spte_tree`."""

from kvmmu.report.spte_tree import SpteRun, spte_runs, spte_text

__all__ = ["SpteRun", "spte_runs", "spte_text"]
