"""One of the processes of a run that accelerate launched."""

from __future__ import annotations

import sys

from hira.errors import HiraError
from hira.training.finetune.run import finetune

if __name__ == "__main__":
    try:
        finetune(sys.argv[1:], launched=True)
    except HiraError as error:
        sys.exit(f"hira: {error}")
