"""An output folder that is complete or absent, and that an interrupted run can continue."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from hira.errors import HiraError
from hira.files.io.manifest import MANIFEST, STATE, FileRecord, check_relative, files_of, record_of, records_of
from hira.files.io.manifest import records_to_json as to_json
from hira.files.io.output_file import BLOCK, OutputFile
from hira.files.io.strict_json import read_object
from hira.files.io.system import explained, locked, sync

PathLike = str | os.PathLike[str]


class Output:
    """Writes a folder beside its target, and renames it to the target when the `with` block ends without an error.

    Files get the permissions of any new file. The folder gets a `hira-manifest.json`, which `manifest.verify` checks.
    When the block fails, or the process is killed, the target is as it was; the finished files of a `job` are kept, and
    `resumed` finds them when the same job runs again.

    Args:
        target: the folder to make.
        overwrite: replace what a non-empty target holds, all of it, once the new folder is complete.
        base: the folders that are read; none may be the target, hold it, or lie in it.
        required_bytes: about how much will be written; less free space is an error at once.
        job: what the run depends on, such as a hash of inputs and options; without it nothing is kept.
        about: fields of the manifest besides the files, as JSON has them.

    Raises:
        HiraError: on entry, the target is not empty, is a file, a mount point or one of `base`, cannot be written to or
            lacks the space, or another process writes to it; within, a file cannot be written.
    """

    def __init__(
        self,
        target: PathLike,
        overwrite: bool = False,
        base: Sequence[PathLike] = (),
        required_bytes: int = 0,
        job: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            self.target = Path(os.path.realpath(Path(target).expanduser()))
        except (ValueError, RuntimeError) as error:  # a NUL in it, or a home that is not known
            raise HiraError(f"the output {str(target)!r} is not a path ({error}); name a folder.") from error
        self.staging = self.target.parent / f".{self.target.name}.hira-staging"
        self._old = self.target.parent / f".{self.target.name}.hira-old"
        self._overwrite, self.required_bytes, self._job = overwrite, required_bytes, job
        self._about = dict(about or {})
        self._bases = [Path(os.path.realpath(Path(folder).expanduser())) for folder in base]
        self._finished: dict[str, FileRecord] = {}
        self._resumable: dict[str, FileRecord] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Output:
        self.check_target()
        with ExitStack() as stack, explained(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.target))
            self._recover()
            self.check_target()  # again, since another writer may have ended meanwhile
            if self.staging.is_symlink():
                raise HiraError(f"{self.staging} is a link, which hira did not make; remove it.")
            self.staging.mkdir(exist_ok=True)
            self._resumable = self._read_state()
            self._clear(keep={*self._resumable, STATE} if self._resumable else set())
            self._check_space()
            self._hasher = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                with explained(self.target, f" What was written is in {self.staging}."):
                    self._commit()
            elif self._job is None or not (self._finished or self._resumable):
                shutil.rmtree(self.staging, ignore_errors=True)

    def resumed(self, name: str) -> bool:
        """Return whether an interrupted run of the same job finished a file; its hash is checked, and it is kept."""
        record = self._resumable.get(name)
        if record is None:
            return False
        found = record_of(self.staging / name)
        del self._resumable[name]  # not before: a run that is interrupted while it hashes keeps the file
        if found == record:
            self._finished[name] = record
        return found == record

    @contextmanager
    def create(self, name: str) -> Iterator[OutputFile]:
        """Open a new file in the folder for writing; at the end of the block it is on the disk and finished.

        Raises:
            HiraError: the name leads out of the folder or is taken, or the file cannot be written; it is removed then.
        """
        if check_relative(name, "a file of the output") in {MANIFEST, STATE, f"{STATE}.new"} or name in self._finished:
            raise HiraError(f"{name} cannot be written to {self.target}: the name is taken.")
        self._resumable.pop(name, None)
        path = self.staging / name
        with explained(path, self._hint()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as raw:
                file = OutputFile(raw, self._hasher)
                try:
                    yield file
                    os.fsync(raw.fileno())
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
            self._finished[name] = file.record()
            self._write_state()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; errors as of `create`."""
        with self.create(name) as file:
            file.write(data)

    def copy(self, source: PathLike, name: str) -> None:
        """Copy the content of a file; errors as of `create`, and where it cannot be read."""
        with self.create(name) as file:
            for chunk in _content(Path(source)):
                file.write(chunk)

    def free_bytes(self) -> int:
        """Return the free space on the disk of the target."""
        there = next(folder for folder in (self.target, *self.target.parents) if folder.is_dir())
        with explained(self.target):
            return shutil.disk_usage(there).free

    def check_target(self) -> None:
        """Raise a HiraError if the target must not be written to."""
        with explained(self.target):
            self._check_target(self.target)

    def _check_target(self, target: Path) -> None:
        for base in self._bases:
            if (
                base == target
                or base in target.parents
                or (target.exists() and base.exists() and target.samefile(base))
            ):
                raise HiraError(f"the output {target} is in {base}, which is read; name another folder.")
            if {self.staging, self._old} & {base, *base.parents}:
                raise HiraError(f"{base}, which is read, is where the output {target} is made; rename one of them.")
            if target in base.parents:
                raise HiraError(f"the output {target} holds {base}, which is read; name another folder.")
        if target in {Path.cwd(), *Path.cwd().parents, Path.home(), *Path.home().parents}:
            raise HiraError(f"the output {target} holds the folder that you are in or your home; name another folder.")
        there = next(folder for folder in target.parents if os.path.lexists(folder))
        if not there.is_dir():
            raise HiraError(f"the output {target} is in {there}, which is not a folder; name another one.")
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise HiraError(f"the output {target} is a file, or a link to itself; name a folder.")
        if os.path.ismount(target):
            raise HiraError(f"the output {target} is a mount point, which cannot be replaced; name a folder within it.")
        if not self._overwrite and any(target.iterdir()):
            raise HiraError(f"the output {target} is not empty; name another folder, or pass --overwrite.")

    def _check_space(self) -> None:
        kept = sum(record.size for record in self._resumable.values())
        free = shutil.disk_usage(self.staging).free
        if free < self.required_bytes - kept:
            if not self._resumable:
                shutil.rmtree(self.staging)
            raise HiraError(
                f"the output {self.target} needs {(self.required_bytes - kept) / 1e9:.3g} GB, but its disk has "
                f"{free / 1e9:.3g} GB free; make room, or name a folder on another disk."
            )

    def _recover(self) -> None:
        """Restore the old folder that a run moved before it was killed, or remove it if the new one is in its place."""
        if os.path.lexists(self._old) and not os.path.lexists(self.target):
            self._old.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)

    def _read_state(self) -> dict[str, FileRecord]:
        """The files that an interrupted run of this job finished, and whose sizes are right."""
        path = self.staging / STATE
        if self._job is None or not path.is_file():
            return {}
        content = read_object(path)
        if content.get("job") != self._job:
            return {}
        files = set(files_of(self.staging))
        return {
            name: record
            for name, record in records_of(content, path).items()
            if name in files
            and not (self.staging / name).is_symlink()
            and (self.staging / name).stat().st_size == record.size
        }

    def _commit(self) -> None:
        """Complete the folder, synchronise it, and rename it to the target."""
        state, manifest = self.staging / STATE, self.staging / MANIFEST
        self._clear(keep={*self._finished, STATE})
        manifest.write_bytes(to_json(self._finished, format=1, **self._about))
        sync(manifest)
        for folder, _, _ in os.walk(self.staging, topdown=False):
            sync(Path(folder))
        if not self._overwrite and self.target.exists() and any(self.target.iterdir()):
            raise HiraError(f"{self.target} was filled by another program meanwhile; the output is in {self.staging}.")
        state.unlink(missing_ok=True)  # last, so that a run that is killed before can go on
        sync(self.staging)
        if self.target.exists():
            self.target.rename(self._old)  # `_recover` undoes this if the process is killed before the next line
        self.staging.rename(self.target)
        sync(self.target.parent)
        if self._old.exists():
            shutil.rmtree(self._old)
            sync(self.target.parent)

    def _clear(self, keep: set[str]) -> None:
        """Remove all files of the staging folder but some, and folders that are empty then."""
        for name in files_of(self.staging):
            if name not in keep:
                (self.staging / name).unlink()
        for folder, _, _ in os.walk(self.staging, topdown=False):
            if Path(folder) != self.staging and not os.listdir(folder):
                os.rmdir(folder)

    def _write_state(self) -> None:
        if self._job is None:
            return
        path, new = self.staging / STATE, self.staging / f"{STATE}.new"
        new.write_bytes(to_json(self._finished | self._resumable, job=self._job))
        sync(new)
        new.replace(path)

    def _hint(self) -> str:
        return " The target is as it was." + (
            " Finished files are kept: make room, and run the same command again." if self._job is not None else ""
        )


def _content(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, in one buffer that each chunk overwrites."""
    buffer = memoryview(bytearray(BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise HiraError(f"{path} cannot be read: {error.strerror}.") from error
