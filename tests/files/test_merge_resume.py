"""Merges that are stopped and run again, meet each other, or find no room: what was finished is kept if it holds."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from plain_folders import bytes_of, everything, file_system, finished, save_sharded
from safetensors.torch import load_file, save_file

from hira import HiraError, merge_checkpoint
from hira.files.io.output_folder import Output


def merged(root, **options):
    return merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, **options)


FINISHED = tuple(f"part-{i:02d}.safetensors" for i in range(3))


class Stopped(Exception):
    pass


def stop_at(part):
    def progress(done, total):
        if done >= total * part:
            raise Stopped

    return progress


@pytest.fixture
def interrupted(tmp_path):
    """A merge that was stopped in its fourth file of four, over an older output; and what it would have given."""
    root = save_sharded(tmp_path, 4, 16)
    merged(root)
    complete = bytes_of(root / "out")
    with Output(root / "out", overwrite=True) as out:
        out.write("old", b"old")
    with pytest.raises(Stopped):
        merged(root, progress=stop_at(0.8))
    assert finished(root) == set(FINISHED)
    assert bytes_of(root / "out")["old"] == b"old"
    return root, complete


def test_finished_files_are_taken_up(interrupted):
    root, complete = interrupted
    reports = []
    assert merged(root, progress=lambda *counts: reports.append(counts)).resumed == FINISHED
    assert bytes_of(root / "out") == complete
    done, totals = zip(*reports, strict=True)
    assert list(done) == sorted(done) and {done[-1]} == set(totals)


def in_file(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def another_config(root):
    path = root / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))


def another_base_config(root):
    """One by which the model's parameters may be others."""
    (root / "base/config.json").write_text(json.dumps({"hidden_size": 16, "tie_word_embeddings": True}))


OTHER_JOBS = {
    "weights": (lambda root: None, {"weights": [2]}),
    "dtype": (lambda root: None, {"dtype": "bfloat16"}),
    "rounding": (lambda root: None, {"rounding": "nearest"}),
    "max_shard_size": (lambda root: None, {"max_shard_size": 10**9}),
    "adapter": (lambda root: in_file(root / "adapter/adapter_model.safetensors", double_first), {}),
    "adapter's config": (another_config, {}),
    "base": (lambda root: in_file(root / "base/part-00.safetensors", double_first), {}),
    "base's config": (another_base_config, {}),
}


def double_first(tensors):
    tensors[min(tensors)] *= 2


@pytest.mark.parametrize("case", OTHER_JOBS)
def test_another_job_takes_nothing_up(interrupted, tmp_path, case):
    root, _ = interrupted
    change, options = OTHER_JOBS[case]
    change(root)
    assert merged(root, **options).resumed == ()
    merge_checkpoint(root / "base", root / "adapter", root / "fresh", **options)
    assert bytes_of(root / "out") == bytes_of(root / "fresh")


CAPABILITIES = {"cpu_name": "another", "avx512_bf16": False}
OTHER_PROCESSORS = {
    "instructions of PyTorch": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    "processor": lambda patch: patch.setattr(torch.cpu, "get_capabilities", lambda: CAPABILITIES, raising=False),
    "machine": lambda patch: patch.setattr(platform, "machine", lambda: "another"),
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 7),
    "instructions of a library": lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
}


@pytest.mark.parametrize("case", OTHER_PROCESSORS)
def test_files_of_another_processor_are_formed_again(interrupted, monkeypatch, case):
    root, complete = interrupted
    OTHER_PROCESSORS[case](monkeypatch)
    assert merged(root).resumed == ()
    assert bytes_of(root / "out") == complete


@pytest.mark.parametrize("other", [False, True], ids=["same instructions", "other instructions"])
def test_a_process_with_other_instructions(interrupted, other):
    root, _ = interrupted
    capability = "avx2" if torch.backends.cpu.get_cpu_capability() != "AVX2" else "default"
    program = (
        "import sys, torch, hira; torch.set_num_threads(int(sys.argv[2])); root = sys.argv[1]; "
        "print(len(hira.merge_checkpoint(f'{root}/base', f'{root}/adapter', f'{root}/out', overwrite=True).resumed))"
    )
    command = [sys.executable, "-c", program, str(root), str(torch.get_num_threads())]
    environment = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if other else {})
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout.splitlines()[-1]) == (0 if other else len(FINISHED))


def test_a_precision_of_products_that_is_another(interrupted):
    root, _ = interrupted
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert merged(root).resumed == ()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_shard_on_another_disk(tmp_path):
    root = save_sharded(tmp_path, 3, 16)
    merged(root)
    complete = bytes_of(root / "out")
    with file_system(tmp_path / "disk", "size=8m") as disk:
        for part in FINISHED[:2]:
            shutil.move(root / "base" / part, disk / part)
            (root / "base" / part).symlink_to(disk / part)
        shutil.move(root / "adapter/adapter_model.safetensors", disk / "adapter")
        (root / "adapter/adapter_model.safetensors").symlink_to(disk / "adapter")
        merged(root)
        found = {name: data for name, data in bytes_of(root / "out").items() if name.endswith(".safetensors")}
        assert found == {name: complete[name] for name in found} and len(found) == 3
        assert not any(path.is_symlink() for path in (root / "out").iterdir())
        (root / "base" / FINISHED[0]).unlink()
        (root / "out" / "kept").mkdir()
        shutil.move(disk / FINISHED[0], root / "out" / "kept" / "weights")
        (root / "base" / FINISHED[0]).symlink_to(root / "out" / "kept" / "weights")
        with pytest.raises(HiraError, match=r"out holds .*kept/weights, which is read"):
            merged(root)
        assert (root / "out" / "kept" / "weights").exists()


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "link"])
def test_a_damaged_file_is_written_anew(interrupted, damage):
    root, complete = interrupted
    path = root / ".out.hira-staging/part-00.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    if damage == "link":
        (root / "elsewhere").write_bytes(bytes(complete[path.name]))
        path.symlink_to(root / "elsewhere")
    elif damage != "gone":
        path.write_bytes(data[: -1 if damage == "cut" else None])
    assert merged(root).resumed == FINISHED[1:]
    assert bytes_of(root / "out") == complete and not (root / "out" / path.name).is_symlink()


def test_a_second_merge_into_one_target_is_refused(tmp_path):
    root, other = save_sharded(tmp_path / "a", 4, 16), save_sharded(tmp_path / "b", 4, 16)
    refused = []

    def progress(done, total):
        for folder in (root, other):  # the same merge, and another
            with pytest.raises(HiraError, match=r"another process is writing to .*out"):
                merge_checkpoint(folder / "base", folder / "adapter", root / "out", overwrite=True)
            refused.append(done)

    merged(root, progress=progress)
    assert len(refused) >= 8 and not finished(root)
    first = bytes_of(root / "out")
    merged(root)
    assert bytes_of(root / "out") == first


def test_a_disk_that_fills_up(tmp_path):
    root = save_sharded(tmp_path, 6, 400)
    with file_system(tmp_path / "disk", "size=8m") as disk:
        with Output(disk / "out") as out:
            out.write("old", b"old")

        def fill(done, total):
            if done > total / 2 and not (disk / "filler").exists():
                with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as file:
                    while file.write(bytes(1 << 12)):
                        pass

        pattern = r"disk/\.out\.hira-staging/part-0[345].* cannot be written: No space left on device.*as it was.*again"
        with pytest.raises(HiraError, match=pattern):
            merge_checkpoint(root / "base", root / "adapter", disk / "out", overwrite=True, progress=fill)
        assert bytes_of(disk / "out")["old"] == b"old"
        with pytest.raises(HiraError, match=r"needs .* GB, but its disk has .* free"):
            merge_checkpoint(root / "base", root / "adapter", disk / "out", overwrite=True)
        assert bytes_of(disk / "out")["old"] == b"old"
        (disk / "filler").unlink()
        report = merge_checkpoint(root / "base", root / "adapter", disk / "out", overwrite=True)
        assert len(report.resumed) >= 3 and os.listdir(disk) == ["out"]
        merged(root)
        assert bytes_of(disk / "out") == bytes_of(root / "out")


def test_a_disk_that_cannot_be_written_to(tmp_path):
    root = save_sharded(tmp_path, 2, 16)
    with file_system(tmp_path / "disk", "size=1m") as disk:
        with Output(disk / "out") as out:
            out.write("old", b"old")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = everything(disk)
        for target in ("out", "new", "deep/new"):
            with pytest.raises(HiraError, match=r"disk/.* cannot be written: Read-only file system"):
                merge_checkpoint(root / "base", root / "adapter", disk / target, overwrite=True)
        assert everything(disk) == before and bytes_of(disk / "out")["old"] == b"old"
