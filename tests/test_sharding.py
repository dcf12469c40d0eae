"""Models spread over two processes: the numbers of one process, checkpoints that load, errors for the rest."""

from __future__ import annotations

import importlib.util
import os
import time
import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import base_layers
import pytest
import sharded_runs
import torch
import torch.multiprocessing
from filelock import FileLock
from oracle import error
from peft import PeftModel
from sharding import CHECKPOINT, MODES, RATE, STEPS, WORLD, adapted, base_model, batch, factors
from torch import Tensor

import hira

SECONDS = 100  # after which a family of processes is ended


def run_family(family: str, folder: Path) -> None:
    base_model("llama").save_pretrained(folder / CHECKPOINT)
    context: Any = torch.multiprocessing.spawn(sharded_runs.start, args=(family, str(folder)), nprocs=WORLD, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the processes of {family} hang")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of a family's modes, run when first asked for, once for all workers of pytest."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def run_or_load(family: str) -> Any:
        folder = shared / f"sharded-{family}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                _run_or_note_error(family, folder)
        error = folder / "error"
        return error.read_text() if error.exists() else torch.load(folder / f"{family}.pt", weights_only=True)

    return cache(run_or_load)


def _run_or_note_error(family: str, folder: Path) -> None:
    """An error is kept as a result is, so that what hangs is waited for once."""
    try:
        run_family(family, folder)
    except Exception:
        (folder / "error").write_text(traceback.format_exc())


def result_of(results: Any, family: str, key: Any) -> Any:
    if family == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    of_family = results(family)
    assert not isinstance(of_family, str), of_family
    found = of_family[key]
    assert not (isinstance(found, str) and found.startswith("Traceback")), found
    return found


CASES = [
    pytest.param(mode, kind, adapters, checkpoint, id=f"{mode.name}-{kind}-{adapters}-{'recomputed' * checkpoint}")
    for mode in MODES
    for kind, adapters in mode.models
    for checkpoint in (False, True)
]
every_case = pytest.mark.parametrize(("mode", "kind", "adapters", "checkpoint"), CASES)
every_mode = pytest.mark.parametrize(
    ("mode", "kind", "adapters"),
    [pytest.param(m, kind, n, id=f"{m.name}-{kind}-{n}") for m in MODES for kind, n in m.models],
)


@cache
def single(kind: str, adapters: int, dtype: torch.dtype, exact: bool) -> dict[str, Any]:
    """Three steps in one process: in float64 from the same numbers, or as the processes do it, half by half."""
    model = adapted(base_model(kind, dtype), kind, adapters)
    if exact:
        model.double()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(STEPS):
        halves = [model(input_ids=ids, labels=ids).loss / WORLD for ids in batch(step).chunk(WORLD)]
        sum(halves).backward()
        found["losses"].append(sum(halves).detach())
        found["gradients"].append({name: p.grad.clone() for name, p in factors(model).items()})
        optimiser.step()
        optimiser.zero_grad()
    found["final"] = {name: p.detach() for name, p in factors(model).items()}
    return found


def joined(tensors: dict[str, Tensor], names: Any) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


@every_case
def test_three_steps_are_those_of_one_process(results, mode, kind, adapters, checkpoint):
    found = result_of(results, mode.family, (mode.name, kind, adapters, checkpoint))
    exact, usual = (single(kind, adapters, mode.dtype, exact) for exact in (True, False))
    names = sorted(exact["final"])
    assert sorted(found["final"]) == names and len(names) == (4 * adapters - 2) * len(hira_names(kind))
    assert all(torch.isfinite(gradient).all() for step in found["gradients"] for gradient in step.values())
    for values, right, ordinary in zip(*(curve(result, names) for result in (found, exact, usual)), strict=True):
        # sums over processes are in another order; 1e-6 is a few roundings of float32
        assert error(values, right) <= 2 * error(ordinary, right) + 1e-6


def curve(result: dict[str, Any], names: list[str]) -> list[Tensor]:
    """The loss and the gradients of each step, then A and B after the last."""
    losses = [loss.double().flatten() for loss in result["losses"]]
    return [*losses, *(joined(step, names) for step in [*result["gradients"], result["final"]])]


def hira_names(kind: str) -> list[str]:
    return [layer.name for layer in hira.tuner.model.hira_layers(adapted(base_model(kind), kind))]


@every_mode
def test_saved_adapters_load_in_one_process(results, mode, kind, adapters):
    found = result_of(results, mode.family, (mode.name, kind, adapters, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base_model(kind, mode.dtype), found["saved"])
        if adapters > 1:
            model.load_adapter(f"{found['saved']}/second", "second")
            model.base_model.set_adapter(["default", "second"])
    loaded = factors(model)
    assert sorted(loaded) == sorted(found["final"])
    for name, value in found["final"].items():
        assert torch.equal(loaded[name], value), name
    model.eval()
    ids = batch(9)
    logits = model(input_ids=ids).logits.float()
    tolerance = 1e-5 if mode.dtype == torch.float32 else 2e-2
    assert error(found["logits"], logits) < tolerance
    if mode.generates:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert torch.equal(found["generated"], model.generate(input_ids=ids, **options))
    model.merge_adapter(["default"])  # the way that the refusal of a merge names


SHARDED = [param for param in CASES if param.values[0].most_gathered is not None and not param.values[3]]


@pytest.mark.parametrize(("mode", "kind", "adapters", "checkpoint"), SHARDED)
def test_weights_are_gathered_as_few_at_a_time_as_the_mode_can(results, mode, kind, adapters, checkpoint):
    found = result_of(results, mode.family, (mode.name, kind, adapters, checkpoint))
    assert 0 < found["gathered"] <= mode.most_gathered


@pytest.mark.parametrize(("mode", "kind", "adapters", "checkpoint"), SHARDED)
def test_no_gathered_weight_is_kept_for_backward(results, mode, kind, adapters, checkpoint):
    """But those of the root's shard group, which FSDP leaves gathered."""
    found = result_of(results, mode.family, (mode.name, kind, adapters, checkpoint))
    parameters = adapted(base_model(kind, mode.dtype), kind, adapters).named_parameters()
    root = sum(p.nbytes for name, p in parameters if ".layers." not in name and ".h." not in name)
    all_are_groups = mode.most_gathered == 1 and kind == "llama"
    assert found["kept"] <= (0 if mode.family == "deepspeed" or all_are_groups else root)


@every_mode
def test_merging_is_refused_where_weights_are_spread(results, mode, kind, adapters):
    found = result_of(results, mode.family, (mode.name, kind, adapters, False))
    if mode.merges:
        assert error(found["merged"], found["logits"]) < 1e-5
    else:
        assert "load it on a model that is not sharded and merge there" in found["merge"]
    assert found["unchanged"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torch adapted after fully_shard", "Adapt the model first, then shard it"),
        ("torch not gathered", "Gather the state dict first"),
        ("torch dropout in parallel", "set hira_dropout=0"),
        ("torch trained in parallel", "freeze the weight"),
        ("torch called alone", "Call the model, not a part of it"),
        ("torch mixed batch", "serve mixed batches on a model that is not sharded"),
        ("deepspeed not gathered", "Gather the state dict first"),
        ("deepspeed mixed batch", "serve mixed batches on a model that is not sharded"),
    ],
)
def test_what_cannot_be_served_is_refused(results, name, text):
    assert text in result_of(results, name.partition(" ")[0], name)


def test_tensor_parallel_processes_start_equal(results):
    for parts in result_of(results, "torch", "torch started apart"):
        assert torch.equal(parts[0], parts[1])


def test_a_base_weight_that_trains_in_its_own_shard_group(results):
    found = result_of(results, "torch", "torch trains too")
    model = adapted(base_model("llama"), "llama")
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
    ids = batch(0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert error(found, weight.grad) < 1e-5


def test_an_adapter_added_under_zero_3(results):
    assert result_of(results, "deepspeed", "deepspeed added later") == ["default", "later"]


def test_the_table_is_that_of_the_modes():
    page = base_layers.SHARDING.read_text()
    assert base_layers.with_tables(page) == page
    assert all(f"| {mode.name} |" in page for mode in MODES)
