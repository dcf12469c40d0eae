"""Compares LoRA, PEFT's HiRA, hira, DoRA and full fine-tuning on this machine; `hira bench` is its command."""

from hira.bench.cases import Options, cases
from hira.bench.measure import Record, run, run_all
from hira.bench.report import load, plot, save, tables

__all__ = ["Options", "Record", "cases", "load", "plot", "run", "run_all", "save", "tables"]
