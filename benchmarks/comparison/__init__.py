"""Compares LoRA, PEFT's HiRA, hira, DoRA and full fine-tuning on this machine.

python -m benchmarks.comparison --quick
"""

from benchmarks.comparison.cases import Options, cases
from benchmarks.comparison.measure import Record, run, run_all
from benchmarks.comparison.report import load, plot, save, tables

__all__ = ["Options", "Record", "cases", "load", "plot", "run", "run_all", "save", "tables"]
