"""Which checkpoint a run resumes from, and what its output folder may hold."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hira.errors import HiraError

ADAPTER = "adapter_model.safetensors"


def checkpoint_to_resume(output: Path, wanted: str | None) -> str | None:
    """The checkpoint's folder: the one wanted, or for "true" the last complete one in the output folder.

    A killed run can leave a checkpoint that is not complete. The trainer's state is the last file of one.

    Raises:
        HiraError: there is no such checkpoint, it is not complete, or the output folder holds another run's adapter.
    """
    if wanted is None or wanted.lower() == "false":
        if (output / ADAPTER).exists():
            raise HiraError(f"{output} holds an adapter already: choose another --output_dir, or move it away.")
        return None
    if wanted.lower() != "true":
        if not _is_complete(Path(wanted)):
            raise HiraError(f"{wanted} is no complete checkpoint: it has no {TRAINER_STATE_NAME}, or a part of one.")
        return wanted
    found = {
        int(step): folder
        for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.rpartition("-")[2]).isdecimal() and _is_complete(folder)
    }
    if not found:
        raise HiraError(f"{output} has no complete checkpoint to resume from; leave out --resume_from_checkpoint.")
    return str(found[max(found)])


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint's last file is there, and was written to its end."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
