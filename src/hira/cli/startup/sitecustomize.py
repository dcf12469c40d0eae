"""Imports hira when Python starts, so that PEFT uses it; Python runs this first in every process below `hira run`.

`hira run` puts this folder on PYTHONPATH, which processes inherit.
"""

import importlib
import os
import sys
from importlib.util import find_spec


def _is_here(folder: str) -> bool:
    return os.path.normcase(os.path.abspath(folder)) == os.path.normcase(os.path.dirname(os.path.abspath(__file__)))


if find_spec("hira") is not None:
    importlib.import_module("hira")
elif find_spec("peft") is not None:
    print(f"{sys.executable}, below `hira run`, has no hira: PEFT's own HiRA is used.", file=sys.stderr)

# another folder may have a module of this name too; where none has, the error is what tells `site` so
sys.path[:] = [folder for folder in sys.path if not _is_here(folder)]
del sys.modules[__name__]
importlib.import_module(__name__)
