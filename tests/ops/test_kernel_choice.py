"""A kernel serves where it is right and faster: the machinery, over Triton's interpreter and over wrong kernels."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
import warnings

import pytest
import torch
from interpreted import DEVICE

from hira.ops import heuristics, kernel_choice, triton
from hira.ops.kernel_choice import serves

KERNELS = ("form", "factor_gradients", "decode")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No verdicts yet, and a folder for those to come."""
    monkeypatch.setattr(kernel_choice, "_verdicts", {})
    monkeypatch.setattr(kernel_choice, "SHAPES", ((1, 1, 1), (63, 65, 3)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hira" / "kernels"


def quick():
    pass


def slow():
    time.sleep(0.01)


def forbidden():
    raise AssertionError("called again")


def weight(dtype=torch.bfloat16):
    return torch.ones(3, 4, dtype=dtype, device=DEVICE)


def break_kernel(monkeypatch, name, change):
    """Have a kernel's results changed."""
    kernel = getattr(triton, name)

    def broken(*args, **kwargs):
        found = kernel(*args, **kwargs)
        return tuple(map(change, found)) if isinstance(found, tuple) else change(found)

    monkeypatch.setattr(triton, name, broken)


@pytest.fixture
def failing(monkeypatch):
    """No kernel runs."""

    def fail(*args, **kwargs):
        raise RuntimeError("out of shared memory")

    for name in KERNELS:
        monkeypatch.setattr(triton, name, fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_kernel_serves_where_it_is_faster(kernel, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert serves(kernel, weight(dtype), dtype, quick, slow)
        kernel_choice._verdicts.clear()
        assert max(kernel_choice.errors(kernel, dtype, dtype, torch.device(DEVICE))) > 0 or dtype == torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_kernel_does_not_serve_where_it_is_slower(kernel):
    assert not serves(kernel, weight(), torch.bfloat16, slow, quick)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 1.1,
        lambda t: t * math.nan,
        torch.zeros_like,
        lambda t: t.index_fill(0, torch.tensor(len(t) - 1, device=t.device), 0.0),
        lambda t: t.flatten().index_fill(0, torch.tensor(t.numel() - 1, device=t.device), 0.0).view(t.shape),
    ],
    ids=["large", "NaN", "zero", "the last row", "one entry"],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_kernel_does_not_serve_and_says_so_once(kernel, change, monkeypatch):
    break_kernel(monkeypatch, kernel, change)
    with pytest.warns(UserWarning, match=rf"{kernel}.*bfloat16.*report.*{torch.__version__.split('+')[0]}"):
        assert not serves(kernel, weight(), torch.bfloat16, forbidden, forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not serves(kernel, weight(), torch.bfloat16, forbidden, forbidden)


@pytest.mark.parametrize("wrong", ["dithered", "large rank", "with LoRA"])
def test_a_kernel_that_is_wrong_in_some_cases_does_not_serve(wrong, monkeypatch):
    monkeypatch.setattr(kernel_choice, "SHAPES", ((63, 65, 33), (63, 65, 3)))
    form = triton.form

    def broken(W0, A, B, dtype, noise=None, lora_r=0):
        found = form(W0, A, B, dtype, noise=noise, lora_r=lora_r)
        case = {"dithered": noise is not None, "large rank": len(A) > 32, "with LoRA": lora_r > 0}
        return 1.1 * found if case[wrong] else found

    monkeypatch.setattr(triton, "form", broken)
    with pytest.warns(UserWarning, match="form.*off by"):
        assert not serves("form", weight(), torch.bfloat16, forbidden, forbidden)


def test_a_kernel_that_fails_does_not_serve(failing):
    with pytest.warns(UserWarning, match="RuntimeError: out of shared memory"):
        assert not serves("form", weight(), torch.bfloat16, forbidden, forbidden)


def test_one_verdict_for_every_shape_of_a_dtype():
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    assert serves("form", torch.ones(5, 2, dtype=torch.bfloat16, device=DEVICE), torch.bfloat16, forbidden, forbidden)
    assert not serves("form", weight(), torch.float16, slow, quick)
    assert serves("form", weight(), torch.bfloat16, forbidden, forbidden)


def test_later_processes_know_the_verdict(cache, monkeypatch):
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    assert not serves("decode", weight(), torch.bfloat16, slow, quick)
    (file,) = cache.glob("*.json")
    assert torch.__version__ in file.name
    found = kernel_choice.known(torch.device(DEVICE))
    assert {entry: verdict.serves for entry, verdict in found.items()} == {
        "form, bfloat16, bfloat16": True,
        "decode, bfloat16, bfloat16": False,
    }
    for verdict in found.values():
        assert 0 < verdict.error <= verdict.allowed == kernel_choice.allowed(torch.bfloat16)
        assert (
            0 < min(verdict.kernel_us, verdict.pytorch_us) < 5000 < 10_000 <= max(verdict.kernel_us, verdict.pytorch_us)
        )
        assert verdict.size == (3, 4)
    assert found == {
        ", ".join((key[0], "bfloat16", "bfloat16")): value for key, value in kernel_choice._verdicts.items()
    }
    kernel_choice._verdicts.clear()
    monkeypatch.setattr(triton, "form", forbidden)
    assert serves("form", weight(), torch.bfloat16, forbidden, forbidden)
    assert not serves("decode", weight(), torch.bfloat16, forbidden, forbidden)


@pytest.mark.parametrize("change", ["torch", "triton", "hira", "driver", "device"])
def test_another_version_is_judged_again(change, monkeypatch):
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    kernel_choice._verdicts.clear()
    other = {**kernel_choice.machine_of(torch.device(DEVICE)), change: "another"}
    monkeypatch.setattr(kernel_choice, "machine_of", lambda device: other)
    assert not serves("form", weight(), torch.bfloat16, slow, quick)


ENTRY = "form, bfloat16, bfloat16"
WHOLE = {"error": 0.001, "allowed": 0.01, "kernel_us": 9.0, "pytorch_us": 1.0, "size": [3, 4], "failure": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"form, torch.bfloat16, torch.bfloat16": false}',  # the first format
        json.dumps({"format": kernel_choice.FORMAT - 1, "verdicts": {ENTRY: WHOLE}}),
        json.dumps({"format": kernel_choice.FORMAT, "verdicts": {ENTRY: {**WHOLE, "kernel_us": "9"}}}),
        json.dumps({"format": kernel_choice.FORMAT, "verdicts": {ENTRY: {**WHOLE, "size": 3}}}),
        json.dumps({"format": kernel_choice.FORMAT, "verdicts": {ENTRY: {**WHOLE, "more": 1}}}),
        json.dumps({"format": kernel_choice.FORMAT, "verdicts": [ENTRY]}),
    ],
)
def test_a_damaged_or_older_file_counts_as_none(cache, text):
    file = kernel_choice._file(kernel_choice.machine_of(torch.device(DEVICE)))
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert kernel_choice.known(torch.device(DEVICE)) == {}
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    assert [verdict.serves for verdict in kernel_choice.known(torch.device(DEVICE)).values()] == [True]


def test_a_whole_file_is_believed(cache, failing):
    file = kernel_choice._file(kernel_choice.machine_of(torch.device(DEVICE)))
    file.parent.mkdir(parents=True)
    for kernel_us, faster in ((9.0, False), (0.5, True)):
        file.write_text(
            json.dumps({"format": kernel_choice.FORMAT, "verdicts": {ENTRY: {**WHOLE, "kernel_us": kernel_us}}})
        )
        kernel_choice._verdicts.clear()
        assert serves("form", weight(), torch.bfloat16, forbidden, forbidden) == faster


def test_a_folder_that_cannot_be_written_keeps_nothing(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in its place")
    assert serves("form", weight(), torch.bfloat16, quick, slow)


def test_nothing_is_judged_while_code_is_traced(cache):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weight())
        assert not serves("form", fake, torch.bfloat16, forbidden, forbidden)
    assert not cache.exists()
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    assert not serves("form", fake, torch.bfloat16, forbidden, forbidden)  # which has no memory for a kernel


def test_what_is_captured_before_a_verdict_fixes_none(cache, monkeypatch):
    monkeypatch.setattr(heuristics, "is_capturing", lambda device: True)
    assert not serves("form", weight(), torch.bfloat16, forbidden, forbidden)
    assert not cache.exists()
    monkeypatch.setattr(heuristics, "is_capturing", lambda device: False)
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    monkeypatch.setattr(heuristics, "is_capturing", lambda device: True)
    assert serves("form", weight(), torch.bfloat16, forbidden, forbidden)


def test_compiled_code_takes_the_verdict_that_eager_code_found(monkeypatch):
    """The operators are opaque to the compiler, and choose when they run."""
    from hira.ops import heuristics, linear

    monkeypatch.setattr(heuristics, "triton", lambda tensor: True)
    judged, calls = [], []
    form = triton.form
    monkeypatch.setattr(triton, "form", lambda *a, **k: calls.append(1) or form(*a, **k))
    found = kernel_choice.Verdict(0.0, 1.0, 1.0, 2.0, (8, 6))
    monkeypatch.setattr(kernel_choice, "judge", lambda name, *_: judged.append(name) or found)
    x, W0, A, B = (torch.randn(*shape, device=DEVICE) for shape in ((20, 6), (8, 6), (2, 6), (8, 2)))
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, W0, A, B), linear(x, W0, A, B))
    assert judged == ["form"]
    assert len(calls) == 2


# ---- several processes


def in_processes(count, function):
    """What the function gives in so many forks of this process, at the same time."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=lambda i=i: results.put(function(i))) for i in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return found


def test_processes_of_one_job_come_to_one_verdict(cache, monkeypatch, tmp_path):
    def judge(*_):
        with (tmp_path / "judged").open("a") as file:
            file.write("once\n")
        time.sleep(0.2)
        return kernel_choice.Verdict(0.0, 1.0, 1.0, 2.0, (3, 4))

    def late(*_):
        raise AssertionError("judged again")

    def run(i):
        time.sleep(0.05 * i)
        kernel_choice.judge = judge if i == 0 else late
        return serves("form", weight(), torch.bfloat16, quick, quick)

    assert in_processes(3, run) == [True] * 3
    assert (tmp_path / "judged").read_text() == "once\n"


def test_no_process_waits_for_ever(cache, monkeypatch):
    monkeypatch.setattr(kernel_choice, "PATIENCE", 0.1)
    with kernel_choice._one_process(kernel_choice.machine_of(torch.device(DEVICE))):
        assert serves("form", weight(), torch.bfloat16, quick, slow)


def test_a_failure_is_tried_again_by_a_later_process(monkeypatch):
    """Memory may have been full, or a compiler missing."""
    form = triton.form

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(triton, "form", full)
    with pytest.warns(UserWarning, match="OutOfMemoryError: no memory"):
        assert not serves("form", weight(), torch.bfloat16, forbidden, forbidden)
    assert not serves("form", weight(), torch.bfloat16, forbidden, forbidden)
    (verdict,) = kernel_choice.known(torch.device(DEVICE)).values()
    assert "no memory" in str(verdict)
    monkeypatch.setattr(triton, "form", form)
    kernel_choice._verdicts.clear()
    assert serves("form", weight(), torch.bfloat16, quick, slow)


# ---- ROCm


def test_an_amd_gpu_is_known_by_its_architecture_and_small_by_its_memory(monkeypatch):
    """Its numbers are like NVIDIA's, (9, 0) for an MI250, and its names like each other."""
    from types import SimpleNamespace

    from hira.ops.triton import tiles

    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), element_size=lambda: 2)
    properties = SimpleNamespace(name="AMD Instinct", gcnArchName="gfx90a:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert tiles.factor_gradients(tensor) == tiles.FACTOR_GRADIENTS
    assert kernel_choice.machine_of(tensor.device)["device"] == "AMD Instinct"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tiles.factor_gradients(tensor) == tiles.SMALL_FACTOR_GRADIENTS
    assert "gfx90a" in kernel_choice.machine_of(tensor.device)["device"]
    assert "/" not in kernel_choice._file(kernel_choice.machine_of(tensor.device)).name


# ---- the report


def test_the_report_has_every_kernel_in_every_dtype(monkeypatch):
    from hira.ops import kernel_bench

    break_kernel(monkeypatch, "decode", lambda t: 1.1 * t)
    monkeypatch.setattr(kernel_choice, "REPEATS", 1)
    with pytest.warns(UserWarning, match="decode"):
        report = kernel_bench.measure(torch.device(DEVICE), size=20, rank=2, tokens=17)
    assert kernel_choice.known(torch.device(DEVICE)) == report.verdicts
    rows = [line.split(" | ") for line in str(report).splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {6}
    names = [row[0].removeprefix("| ") for row in rows]
    for dtype in ("float32", "bfloat16", "float16"):
        for kernel in KERNELS:
            verdict = report.verdicts[f"{kernel}, {dtype}, {dtype}"]
            assert (verdict.kernel_us is None) == (kernel == "decode")
            assert f"{kernel}, {dtype}, {dtype}" in names
        assert f"a copy of W0, {dtype}" in names
    assert len(report.wrong) == 3
    assert all("decode" in line and "off by" in line for line in report.wrong)
    assert str(report).startswith(f"{DEVICE}; torch {torch.__version__}") or DEVICE == "cuda"
    assert json.loads(json.dumps(report.as_dict()))["tokens"] == 17
