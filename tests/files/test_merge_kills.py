"""Merges that are killed: the old output or the new one is there, and the next merge goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
from plain_folders import bytes_of, finished, save_sharded

from hira.files.io.model_folder import INDEX

# Forks a child, with all its imports done, for each merge that it is asked for, and kills it after some seconds, or has
# it kill itself at an event of the interpreter, such as the opening of a file. A child says what came of its merge.
SERVER = """
import json, os, resource, signal, sys, time
import peft, torch
from hira import HiraError
from hira.files.merge.merge_checkpoint import merge_checkpoint

torch.set_num_threads(1)

def say(**facts):
    os.write(1, (json.dumps(facts) + "\\n").encode())

def merge(base, adapter, out, weight, events=None):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event.startswith(("open", "os.", "shutil.", "fcntl.")):
            count += 1
            if count == events:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        report = merge_checkpoint(base, adapter, out, weights=[weight], overwrite=True)
        say(resumed=report.resumed, events=count)
    except HiraError as error:
        say(error=str(error), kib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    after = order.pop("after")
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        merge(**order)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # it is not waited for yet, so the id is its own
    say(status=os.waitpid(child, 0)[1], seconds=time.monotonic() - start)
"""


class Server:
    """Merges in processes of their own."""

    def __init__(self, process):
        self.process = process

    def merge(self, root, weight, after=None, **options):
        """Merge, and kill the process after some seconds; what it said is returned."""
        order = {name: str(root / name) for name in ("base", "adapter", "out")} | {"weight": weight, "after": after}
        self.process.stdin.write(json.dumps(order | options) + "\n")
        self.process.stdin.flush()
        said = {}
        while "status" not in said:
            said |= json.loads(self.process.stdout.readline())
        return said


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield Server(process)
        process.stdin.close()


def undisturbed(server, root):
    """What merges with the weights 1 and 2 give; the first is left as the older output. And the time of the fastest."""
    wanted, seconds = {}, []
    for weight in (2.0, 1.0, 2.0, 1.0):
        said = server.merge(root, weight)
        assert said["status"] == 0 and said["resumed"] == []
        found = bytes_of(root / "out")
        assert wanted.setdefault(weight, found) == found
        seconds.append(said["seconds"])
    assert wanted[1.0] != wanted[2.0] and wanted[1.0].keys() == wanted[2.0].keys()
    return wanted, min(seconds)


def survives(server, root, wanted, old, new, **kill):
    """Kill a merge: old or new is there; a second one goes on and completes new. Returns what was found."""
    said = server.merge(root, new, **kill)
    killed = os.WIFSIGNALED(said["status"])
    assert killed or said["status"] == 0
    moved = not (root / "out").exists()
    if moved:  # between the two renames
        assert bytes_of(root / ".out.hira-old") == wanted[old]
    else:
        found = bytes_of(root / "out")
        assert found == wanted[new] or (killed and found == wanted[old])
    done = finished(root)
    again = server.merge(root, new)
    assert again["status"] == 0 and set(again["resumed"]) == done
    assert bytes_of(root / "out") == wanted[new]
    assert sorted(os.listdir(root)) == ["adapter", "base", "out"]
    return killed, "moved" if moved else "new" if found == wanted[new] else "old", len(done)


def test_killed_at_random_moments(server, tmp_path):
    root = save_sharded(tmp_path, 9, 384)
    wanted, seconds = undisturbed(server, root)
    rng = random.Random(0)
    results, new, old = [], 2.0, 1.0
    for i in range(20):  # one in each twentieth of the time
        results.append(survives(server, root, wanted, old, new, after=seconds * 1.02 * (i + rng.random()) / 20))
        new, old = old, new
    assert sum(killed for killed, _, _ in results) >= 10
    assert sum(done > 0 for _, _, done in results) >= 4


def test_killed_before_every_step(server, tmp_path):
    """Before each file that is opened, each that is renamed, ..."""
    root = save_sharded(tmp_path, 3, 8)
    wanted, _ = undisturbed(server, root)
    steps = server.merge(root, 1.0)["events"]
    results, new, old = [], 2.0, 1.0
    chosen = [*range(1, steps // 3, 9), *range(steps // 3, steps + 1)]
    for step in chosen:
        results.append(survives(server, root, wanted, old, new, events=step))
        new, old = old, new
    assert all(killed for killed, _, _ in results)
    states = [state for _, state, _ in results]
    assert states == sorted(states, key=["old", "moved", "new"].index)
    assert set(states) == {"old", "moved", "new"}
    done = [count for _, _, count in results]
    last = len(done) - 1 - done[::-1].index(3)
    assert done[: last + 1] == sorted(done[: last + 1]) and done[0] == 0
    assert states[last + 1 :].count("old") <= 3  # the notes go when all else is done


def test_an_index_of_a_million_names(server, tmp_path):
    root = save_sharded(tmp_path, 2, 8)
    content = json.loads((root / "base" / INDEX).read_text())
    content["weight_map"] |= {f"t{i}": "part-00.safetensors" for i in range(10**6)}
    (root / "base" / INDEX).write_text(json.dumps(content))
    said = server.merge(root, 1.0)
    assert f"{INDEX} names 1000000 tensors that their shards lack" in said["error"]
    assert said["kib"] < 800 << 10 and said["seconds"] < 30
    assert sorted(os.listdir(root)) == ["adapter", "base"]
