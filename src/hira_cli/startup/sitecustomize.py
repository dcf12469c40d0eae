"""Registers hira as soon as PEFT is imported; Python runs this first in every process below `hira run`.

`hira run` puts this folder on PYTHONPATH, which processes inherit. Before PEFT is imported, this imports nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any


class _PeftFinder:
    """Finds peft as the other finders do, and lets hira follow it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _followed_by_hira(spec.loader.exec_module)  # type: ignore[method-assign]
                return spec
        return None


def _followed_by_hira(exec_module: Any) -> Any:
    def execute(module: ModuleType) -> None:
        exec_module(module)
        if "hira" in sys.modules:  # and registers itself where its own import is what imports peft
            return
        import warnings
        from importlib.util import find_spec

        if find_spec("hira") is not None:
            importlib.import_module("hira")
        else:
            warnings.warn(f"{sys.executable}, below `hira run`, has no hira: PEFT's own HiRA is used.", stacklevel=2)

    return execute


def _is_here(folder: str) -> bool:
    return os.path.normcase(os.path.abspath(folder)) == os.path.normcase(os.path.dirname(os.path.abspath(__file__)))


sys.meta_path.insert(0, _PeftFinder())

# another folder may have a module of this name too; where none has, the error is what tells `site` so
sys.path[:] = [folder for folder in sys.path if not _is_here(folder)]
del sys.modules[__name__]
importlib.import_module(__name__)
