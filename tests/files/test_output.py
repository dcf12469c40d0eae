"""Output folders: the old one is intact or the new one is complete, whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time

import pytest

from hira.errors import HiraError
from hira.files.io import output_folder as output_module
from hira.files.io.manifest import MANIFEST, STATE, verify
from hira.files.io.output_folder import Output


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def test_a_folder_is_written_whole_and_verifies(tmp_path):
    target = tmp_path / "new" / "out"
    (tmp_path / "source").write_bytes(b"copied")
    (tmp_path / "source").chmod(0o600)
    with Output(target, required_bytes=10) as out:
        with out.create("a.safetensors") as file:
            file.write(b"one ")
            file.write(memoryview(bytearray(b"two")))
        out.copy(tmp_path / "source", "deep/er/b.txt")
        out.write("empty", b"")
        assert not target.exists()
    assert contents(target) == {"a.safetensors": b"one two", "deep/er/b.txt": b"copied", "empty": b""}
    assert verify(target) == []
    assert os.listdir(target.parent) == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in target.rglob("*") if p.is_file()} == {0o666 & ~mask}
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
    record = json.loads((target / MANIFEST).read_text())["files"]["empty"]
    assert record == {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}


def test_verify_names_what_is_wrong(tmp_path):
    with Output(tmp_path / "out") as out:
        for name in ("changed", "cut", "gone", "same"):
            out.write(name, b"12345678")
    target = tmp_path / "out"
    (target / "changed").write_bytes(b"12345679")
    (target / "cut").write_bytes(b"1")
    (target / "gone").unlink()
    (target / "more").touch()
    problems = verify(target)
    assert [line.split(":")[0] for line in problems] == ["more", "changed", "cut", "gone"]
    assert "SHA-256" in problems[1] and "1 bytes, not 8" in problems[2]
    (target / MANIFEST).write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}')
    with pytest.raises(HiraError, match=r"'\.\.'"):
        verify(target)
    (target / MANIFEST).unlink()
    with pytest.raises(HiraError, match="nothing to check it against"):
        verify(target)


def test_overwriting(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(HiraError, match=r"not empty.*--overwrite"), Output(target):
        pass
    with pytest.raises(RuntimeError, match="stop"), Output(target, overwrite=True) as out:
        out.write("new", b"new")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == ["out"]
    with Output(target, overwrite=True) as out:
        out.write("new", b"new")
        assert contents(target) == {"old": b"old"}
    assert contents(target) == {"new": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    """As a kill between the two renames leaves it."""
    (tmp_path / ".out.hira-old").mkdir()
    (tmp_path / ".out.hira-old/old").touch()
    with pytest.raises(HiraError, match="not empty"), Output(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == ["old"]


def test_targets_that_are_refused(tmp_path, monkeypatch):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for target, message in {
        base: "which is read",
        base / "sub" / "out": "which is read",
        tmp_path / "link": "which is read",
        tmp_path / "models": "holds .*base, which is read",
        tmp_path / "file": "is a file",
        tmp_path / "file" / "deep" / "out": "file, which is not a folder",
        "/": "holds",
        os.getcwd(): "folder that you are in",
        "/proc": "mount point",
        tmp_path / "loop": "link to itself",
        tmp_path / ("n" * 300): "cannot be written: File name too long",
        "a\0b": "is not a path",
        "~nobody-of-that-name/out": "is not a path",
    }.items():
        with pytest.raises(HiraError, match=message), Output(target, overwrite=True, base=[base]):
            pass
        if "not a path" not in message:  # as before a merge, outside of a `with`
            with pytest.raises(HiraError, match=message):
                Output(target, overwrite=True, base=[base]).check_target()
    for name in ("../x", "/x", "a/../../x", "", "a//b", "a\0b", "a\udcff", MANIFEST, STATE, f"{STATE}.new"):
        with pytest.raises(HiraError), Output(tmp_path / "out") as out:
            out.write(name, b"")
    with (
        pytest.raises(HiraError, match=r"needs 1e\+09 GB, but its disk has"),
        Output(tmp_path / "o", required_bytes=10**18),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "loop", "models"]


@pytest.mark.parametrize("name", [".out.hira-staging", ".out.hira-staging/base", ".out.hira-old", ".out.hira-old/base"])
def test_what_is_read_is_not_where_the_output_is_made(tmp_path, name):
    base = tmp_path / name
    base.mkdir(parents=True)
    (base / "precious").touch()
    with pytest.raises(HiraError, match=rf"{name}, which is read, is where the output .*out is made"):
        Output(tmp_path / "out", base=[tmp_path / "other", base]).check_target()
    with pytest.raises(HiraError, match="is made"), Output(tmp_path / "out", base=[base]):
        pass
    assert os.listdir(base) == ["precious"]


def test_copies_of_what_is_not_there(tmp_path):
    (tmp_path / "source").write_bytes(b"12345")
    for source, message in (("absent", "absent cannot be read: No such file"), (".", "cannot be read: Is a dir")):
        with pytest.raises(HiraError, match=message), Output(tmp_path / "out") as out:
            out.copy(tmp_path / source, "a")
    assert os.listdir(tmp_path) == ["source"]
    with Output(tmp_path / "out") as out:
        out.copy(tmp_path / "source", "a")
    assert contents(tmp_path / "out") == {"a": b"12345"}


def test_notes_of_what_is_finished_go_last(tmp_path, monkeypatch):
    """A run that is killed while the folder is completed can go on."""
    found = []
    monkeypatch.setattr(output_module, "sync", lambda path: found.append((path.name, (path / STATE).exists())))
    with Output(tmp_path / "out", job="job") as out:
        out.write("deep/a", b"a")
    assert found == [
        (f"{STATE}.new", False),
        (MANIFEST, False),
        ("deep", False),
        (".out.hira-staging", True),
        (".out.hira-staging", False),
        (tmp_path.name, False),
    ]
    assert sorted(contents(tmp_path / "out")) == ["deep/a"]


def files_of(target, name):
    return {f"part{i}": f"{name}{i}".encode() for i in range(3)}


def write(target, name, **options):
    with Output(target, overwrite=True, job=name, **options) as out:
        for part, data in files_of(target, name).items():
            if not out.resumed(part):
                out.write(part, data)


@pytest.mark.parametrize("spelling", ["absolute", "link", "relative"])
def test_a_second_writer_loses_nothing_at_any_moment(tmp_path, monkeypatch, spelling):
    """One that comes between any two steps of the first, whatever it calls the folder, is refused."""
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    other = {"absolute": tmp_path / "out", "link": tmp_path / "link" / "out", "relative": "./out"}[spelling]
    write(tmp_path / "out", "old")
    refused = []

    def second(event, arguments):
        if armed and event in {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.mkdir"}:
            armed.clear()  # what it does itself is not to be met
            with pytest.raises(HiraError, match=r"another process is writing to .*out; wait"):
                write(other, "second")
            refused.append(event)
            armed.append(True)

    armed: list[bool] = []
    sys.addaudithook(second)
    with Output(tmp_path / "out", overwrite=True, job="first") as out:
        armed.append(True)
        for part, data in files_of(out.target, "first").items():
            out.write(part, data)
        steps = out._stack  # the lock is lifted when what is on this stack is left
        steps.callback(armed.clear)
    assert len(refused) >= 5 and {"os.remove", "os.rmdir"} <= set(refused)
    assert contents(tmp_path / "out") == files_of(out.target, "first") and verify(tmp_path / "out") == []
    write(other, "second")
    assert contents(tmp_path / "out") == files_of(out.target, "second") and verify(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


@pytest.mark.parametrize("exists", [True, False])
def test_two_processes_write_a_folder_again_and_again(tmp_path, exists):
    target = tmp_path / "out"
    if exists:
        write(target, "old")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", RIVAL, target, name], **pipes) for name in ("a", "b")]
    assert [process.stdout.readline() for process in writers] == ["ready\n"] * 2
    for process in writers:
        process.stdin.write("go\n")
        process.stdin.flush()
    refused = [int(process.communicate(timeout=120)[0]) for process in writers]
    assert [process.returncode for process in writers] == [0, 0] and sum(refused) > 0
    assert contents(target) in (files_of(target, "a"), files_of(target, "b")) and verify(target) == []
    assert os.listdir(tmp_path) == ["out"]


RIVAL = """
import sys, time
from hira import HiraError
from hira.files.io.output_folder import Output
target, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
written = refused = 0
while written < 20:
    try:
        with Output(target, overwrite=True, job=name) as out:
            for i in range(3):
                out.write(f"part{i}", f"{name}{i}".encode())
        written += 1
        time.sleep(0.01)
    except HiraError as error:
        assert "another process is writing to" in str(error), error
        refused += 1
        time.sleep(0.001)
print(refused)
"""


def test_the_lock_of_a_process_that_was_killed_is_lifted(tmp_path):
    target = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, target], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "writing\n"
    with pytest.raises(HiraError, match="another process is writing"):
        write(target, "held")
    with pytest.raises(HiraError, match="another process is writing"), Output(target, job="held") as out:
        out.resumed("part0")
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".out.hira-lock").exists()
    with Output(target, job="held") as out:
        assert out.resumed("part0")  # and the refused ones took nothing away
    assert verify(target) == [] and os.listdir(tmp_path) == ["out"]


HOLDER = """
import sys, time
from hira.files.io.output_folder import Output
with Output(sys.argv[1], job="held") as out:
    out.write("part0", b"held0")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_was_filled_while_this_writer_waited_its_turn_is_kept(tmp_path, monkeypatch):
    """It is looked at again under the lock: without --overwrite it has to be empty then."""
    locked = output_module.locked

    def late(target):
        monkeypatch.setattr(output_module, "locked", locked)
        write(target, "first")
        return locked(target)

    monkeypatch.setattr(output_module, "locked", late)
    with pytest.raises(HiraError, match="is not empty"), Output(tmp_path / "out") as out:
        out.write("a", b"a")
    assert contents(tmp_path / "out") == files_of(tmp_path, "first") and os.listdir(tmp_path) == ["out"]


def interrupted(target, job="job"):
    with pytest.raises(RuntimeError), Output(target, job=job) as out:
        out.write("a", b"aaaa")
        out.write("b", b"bbbb")
        with out.create("c") as file:
            file.write(b"cc")
            raise RuntimeError


def test_an_interrupted_job_goes_on(tmp_path):
    target = tmp_path / "out"
    interrupted(target)
    staged = tmp_path / ".out.hira-staging"
    assert sorted(os.listdir(staged)) == [STATE, "a", "b"]
    (staged / "b").write_bytes(b"bbbx")  # of the right size, but damaged
    with Output(target, job="job") as out:
        assert [out.resumed(name) for name in "abc"] == [True, False, False]
        out.write("b", b"bbbb")
        out.write("c", b"cccc")
    assert contents(target) == {"a": b"aaaa", "b": b"bbbb", "c": b"cccc"}
    assert verify(target) == []
    assert os.listdir(tmp_path) == ["out"]


def test_a_job_that_is_interrupted_before_it_goes_on_keeps_its_files(tmp_path, monkeypatch):
    interrupted(tmp_path / "out")
    staged = tmp_path / ".out.hira-staging"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output_module, "record_of", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with Output(tmp_path / "out", job="job") as out:
            out.resumed("a")
    assert sorted(os.listdir(staged)) == [STATE, "a", "b"]
    with Output(tmp_path / "out", job="job") as out:
        assert [out.resumed(name) for name in "ab"] == [True, True]


@pytest.mark.parametrize("job", ["other", None])
def test_another_job_starts_anew(tmp_path, job):
    interrupted(tmp_path / "out")
    with Output(tmp_path / "out", job=job) as out:
        assert not out.resumed("a")
        out.write("z", b"")
    assert contents(tmp_path / "out") == {"z": b""}


@pytest.fixture
def mounted(tmp_path):
    """A small file system of its own, mounted with the options it is called with."""
    made = []

    def mount(options):
        folder = tmp_path / f"mount{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(mounted):
    disk = mounted("size=2m")
    target = disk / "out"
    with Output(target) as out:
        out.write("old", b"old")
    with pytest.raises(HiraError, match=r"No space left on device.*as it was.*same command"):
        fill(target)
    assert contents(target) == {"old": b"old"} and verify(target) == []
    assert sorted(os.listdir(disk / ".out.hira-staging")) == [STATE, "part0"]
    with pytest.raises(HiraError, match=r"needs .* GB free"), Output(target, overwrite=True, required_bytes=4 << 20):
        pass


def fill(target):
    with Output(target, overwrite=True, job="job") as out:
        for i in range(3):
            out.write(f"part{i}", bytes(1 << 20))


def test_a_full_disk_simulated(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HiraError, match="cannot be written: No space left on device"), Output(tmp_path / "out") as out:
        out.write("a", b"a")
    assert os.listdir(tmp_path) == []


def test_a_read_only_target(mounted):
    disk = mounted("ro")
    with pytest.raises(HiraError, match="cannot be written: Read-only file system"), Output(disk / "out"):
        pass


WRITER = """
import sys
from hira.files.io.output_folder import Output
target, start = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
for version in range(start, 10**6):
    with Output(target, overwrite=True, job=str(version)) as out:
        for i in range(4):
            if not out.resumed(f"part{i}"):
                with out.create(f"part{i}") as file:
                    for _ in range(4):
                        file.write(str(version).encode() * 2**14)
"""


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(tmp_path, seed):
    target = tmp_path / "out"
    with Output(target) as out:
        out.write("part0", b"0")
    rng = random.Random(seed)
    for start in (1, 10_000):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, target, str(start)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.25))
        process.kill()
        process.communicate()
        assert verify(target) == []
    with Output(target, overwrite=True) as out:
        out.write("last", b"last")
    assert contents(target) == {"last": b"last"} and verify(target) == []
    assert os.listdir(tmp_path) == ["out"]
