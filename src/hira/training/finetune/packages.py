"""The packages that `hira finetune` takes beyond hira's own, looked for before anything imports them."""

from __future__ import annotations

from importlib.util import find_spec

from hira.errors import HiraError

NEEDED = ("accelerate", "datasets", "matplotlib", "transformers", "trl")


def check_packages() -> None:
    """Refuse to go on without them.

    Raises:
        HiraError: some are not installed.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise HiraError(f"hira finetune needs {', '.join(missing)}: pip install 'hira[train]'.")
