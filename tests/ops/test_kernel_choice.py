"""A kernel serves where it is right and faster: the machinery, over Triton's interpreter and over wrong kernels."""

from __future__ import annotations

import json
import math
import time
import warnings

import pytest
import torch
from interpreted import DEVICE

from hira.ops import kernel_choice, triton
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
    "change", [lambda t: t * 1.1, lambda t: t * math.nan, torch.zeros_like], ids=["large", "NaN", "zero"]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_kernel_does_not_serve_and_says_so_once(kernel, change, monkeypatch):
    break_kernel(monkeypatch, kernel, change)
    with pytest.warns(UserWarning, match=rf"{kernel}.*bfloat16.*report.*{torch.__version__.split('+')[0]}"):
        assert not serves(kernel, weight(), torch.bfloat16, forbidden, forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not serves(kernel, weight(), torch.bfloat16, forbidden, forbidden)


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
    (file,) = cache.iterdir()
    assert torch.__version__ in file.name
    assert sorted(json.loads(file.read_text()).values()) == [False, True]
    kernel_choice._verdicts.clear()
    monkeypatch.setattr(triton, "form", forbidden)
    assert serves("form", weight(), torch.bfloat16, forbidden, forbidden)
    assert not serves("decode", weight(), torch.bfloat16, forbidden, forbidden)


@pytest.mark.parametrize("change", ["torch", "triton", "hira", "driver", "device"])
def test_another_version_is_judged_again(change, monkeypatch):
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    kernel_choice._verdicts.clear()
    other = {**kernel_choice._machine(torch.device(DEVICE)), change: "another"}
    monkeypatch.setattr(kernel_choice, "_machine", lambda device: other)
    assert not serves("form", weight(), torch.bfloat16, slow, quick)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"form, torch.bfloat16, torch.bfloat16": 1}'])
def test_a_damaged_file_counts_as_none(cache, text):
    file = kernel_choice._file(kernel_choice._machine(torch.device(DEVICE)))
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert serves("form", weight(), torch.bfloat16, quick, slow)
    assert list(json.loads(file.read_text()).values()) == [True]


def test_a_folder_that_cannot_be_written_keeps_nothing(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in its place")
    assert serves("form", weight(), torch.bfloat16, quick, slow)


def test_nothing_is_timed_while_code_is_traced(cache, failing):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weight())
        assert not serves("form", fake, torch.bfloat16, forbidden, forbidden)
    assert not cache.exists()
