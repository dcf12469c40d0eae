"""Names inside a folder: plain ones only, and links to elsewhere only where they can do no harm."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from hira.errors import HiraError


def opened_folder(path: str | os.PathLike[str], what: str, otherwise: str = "") -> Path:
    """Return the real path of a folder that a user named; a HiraError if there is none, or it cannot be read.

    Messages call it `what`, and say `otherwise` besides to check the path.
    """
    try:
        root = Path(path).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise HiraError(f"{what} {str(path)!r} is not a folder here; check the path{otherwise}.") from error
    if not root.is_dir():
        raise HiraError(f"{what} {str(path)!r} is not a folder but a file; pass its folder, {root.parent}.")
    if not os.access(root, os.R_OK | os.X_OK):
        raise HiraError(f"{what} {str(path)!r} cannot be read: permission denied.")
    return root


def check_basename(name: object, what: str) -> str:
    """Return a file's name if it is a plain one, with no path in it; else raise a HiraError that says `what` it is."""
    if not isinstance(name, str) or not name or name in {".", ".."} or len(name.encode(errors="replace")) > 255:
        raise HiraError(f"{what} is {str(name)[:100]!r}, which is not a file's name; it was damaged or tampered with.")
    if any(character in "/\\:" or ord(character) < 32 or "\ud800" <= character <= "\udfff" for character in name):
        raise HiraError(f"{what} is {name!r}, but must be a plain name inside the folder, without a path.")
    return name


_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a blob is named by its hash


def inside(root: Path, name: str, *, weights: bool = False) -> Path:
    """Return the real path of a plain file in a folder, or among the blobs of the same repository in the hub's cache.

    A folder from elsewhere may have a link to a private file, whose content would be copied and then shared. A file
    that has to be safetensors, with the tensors that are expected, cannot be one: with `weights` it may be a link to
    anywhere.

    Raises:
        HiraError: there is no such file, it is not a plain one, or a link leads elsewhere.
    """
    path = root / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise HiraError(f"{path} is missing, or cannot be reached; download the folder's files again.") from error
    if not (weights or real.is_relative_to(root) or _is_blob(path, real, _blobs(root))):
        raise HiraError(
            f"{path} is a link to {real}, outside its folder, which only safetensors files may be; put the file "
            "itself there."
        )
    if not stat.S_ISREG(mode):
        raise HiraError(f"{path} is not a plain file; remove it, or put a file there.")
    return real


def _is_blob(path: Path, real: Path, blobs: Path | None) -> bool:
    """Whether a file is one of the repository's blobs, or a link to one that lies elsewhere by the same name."""
    if blobs is None or real.parent == blobs:
        return blobs is not None
    link = path.parent.resolve() / os.readlink(path) if path.is_symlink() else path
    return link.parent.resolve() == blobs.resolve() and link.name == real.name and bool(_BLOB.fullmatch(real.name))


def _blobs(root: Path) -> Path | None:
    """Where the hub's cache keeps the files of a folder in `<repository>/snapshots/<revision>`."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return folder.parent.parent / "blobs"
    return None
