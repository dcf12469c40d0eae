"""Compares LoRA, PEFT's HiRA, hira, DoRA and full fine-tuning on this machine; `hira bench` is its command."""

from hira.bench.cases import Options, cases
from hira.bench.measure import Record, run
from hira.bench.report import plot, save, table

__all__ = ["Options", "Record", "cases", "plot", "run", "save", "table"]
