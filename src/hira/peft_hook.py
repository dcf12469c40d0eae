"""Registers HiRA with PEFT: at once where PEFT is imported already, else right after its import."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """Have PEFT use hira from now on, or from its import on. Safe to repeat."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder:
    """Finds PEFT as the other finders do, and gives it a loader that registers hira behind it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The other finders' answer for PEFT, None for everything else."""
        if name != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _then_registering(spec.loader.exec_module)  # type: ignore[method-assign]
                return spec
        return None


def _then_registering(exec_module: Any) -> Any:
    def execute(module: ModuleType) -> None:
        exec_module(module)
        _register()

    return execute


def _register() -> None:
    from hira.peft_integration.registration import register

    register()
