"""What the processes of test_sharding.py do with a model: train it, save it, generate, and what it refuses."""

from __future__ import annotations

import datetime
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from gathered_weights import watched
from peft import get_peft_model_state_dict
from sharding import MODES, STEPS, WORLD, Run, ShardingMode, adapted, base_model, batch, factors, own_rows
from torch import Tensor

import hira
from hira import HiraError

SECONDS = 30  # after which a process no longer waits for another


def start(rank: int, family: str, folder: str) -> None:
    """Run all modes of a family in this process; the first process saves what came of each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="true")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{family}.store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    if family == "deepspeed":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, which takes a minute
    results: dict[Any, Any] = {}
    for mode in MODES:
        if mode.family == family:
            for kind, adapters in mode.models:
                for checkpoint in (False, True):
                    key = (mode.name, kind, adapters, checkpoint)
                    results[key] = _caught(lambda: case(mode, kind, adapters, checkpoint, folder))  # noqa: B023
    for name, function in CHECKS.items():
        if name.startswith(family):
            results[name] = _caught(function)
    if rank == 0:
        torch.save(results, f"{folder}/{family}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _caught(function: Callable[[], Any]) -> Any:
    """What a function returns, or the trace of its error, for the test to show."""
    try:
        return function()
    except Exception:
        return traceback.format_exc()


def case(mode: ShardingMode, kind: str, adapters: int, checkpoint: bool, folder: str) -> dict[str, Any]:
    run = mode.spread(folder, kind, adapters, checkpoint)
    result: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(STEPS):
        ids = batch(step) if mode.whole_batch else own_rows(batch(step))
        with watched(run.model) as watch:
            loss = _forward(run, ids, watch.kept)
            result["kept"] = watch.bytes_kept
            run.backward(loss)
        assert watch.seen > 0
        result["gathered"] = watch.most
        mean = loss.detach().double()
        if not mode.whole_batch:
            dist.all_reduce(mean)
            mean /= WORLD
        result["losses"].append(mean)
        with run.whole():
            result["gradients"].append({n: run.gradient(p).detach().clone() for n, p in factors(run.model).items()})
        run.step()
    with run.whole():
        result["final"] = {name: run.value(p).detach().clone() for name, p in factors(run.model).items()}
    if not checkpoint:
        result |= _served(run, mode, f"{folder}/{mode.name}-{kind}-{adapters}".replace(" ", "_"))
    if hasattr(run.call, "destroy"):
        run.call.destroy()
    return result


def _served(run: Run, mode: ShardingMode, path: str) -> dict[str, Any]:
    """What comes of a trained model: its file, its outputs, and what is merged or refused."""
    result: dict[str, Any] = {"saved": _save(run, path)}
    run.call.eval()
    ids = batch(9)  # the same in all processes
    with torch.no_grad():
        result["logits"] = run.call(input_ids=ids).logits.float()
    if mode.generates:
        generated = run.model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        result["generated"] = generated
    before = {name: parameter.shape for name, parameter in run.model.named_parameters()}
    if mode.merges:
        run.model.merge_adapter()
        with torch.no_grad():
            result["merged"] = run.call(input_ids=ids).logits.float()
        run.model.unmerge_adapter()
    else:
        result["merge"] = _error(run.model.merge_adapter)
    result["unchanged"] = before == {name: parameter.shape for name, parameter in run.model.named_parameters()}
    return result


def _forward(run: Run, ids: Tensor, kept: list[Tensor]) -> Tensor:
    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    if any(getattr(m, "gradient_checkpointing", False) for m in run.model.modules()):  # has hooks of its own
        loss: Tensor = run.call(input_ids=ids, labels=ids).loss
        return loss
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.call(input_ids=ids, labels=ids).loss
    return loss


def _save(run: Run, path: str) -> str:
    first = dist.get_rank() == 0
    if run.state_dict is None:  # Transformers' tensor parallelism gathers in it, so all processes call it
        run.model.save_pretrained(path, save_embedding_layers=False, is_main_process=first)
    else:
        state_dict = run.state_dict()
        if first:
            run.model.save_pretrained(path, save_embedding_layers=False, state_dict=state_dict)
    dist.barrier()
    return path


def _error(function: Callable[[], Any]) -> str:
    """The text of the HiraError that a function must raise."""
    try:
        function()
    except HiraError as error:
        return str(error)
    raise AssertionError("no HiraError was raised")


# What is asked of one mode alone


def _adapted_after_fully_shard() -> str:
    from torch.distributed.fsdp import fully_shard

    model = base_model("llama")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    error = _error(lambda: adapted(model, "llama"))
    assert not hira.tuner.model.hira_layers(model)
    return error


def _not_gathered() -> str:
    run = _mode("FSDP2, `fully_shard` of each block")
    return _error(lambda: get_peft_model_state_dict(run.model))


def _not_gathered_zero() -> str:
    run = _mode("ZeRO-3")
    error = _error(lambda: get_peft_model_state_dict(run.model, save_embedding_layers=False))
    run.call.destroy()
    return error


def _dropout_in_parallel() -> str:
    from sharding import divide

    model = adapted(base_model("llama"), "llama", hira_dropout=0.5)
    divide(model.get_base_model(), ".base_layer")
    return _error(lambda: model(input_ids=batch(0)))


def _trained_in_parallel() -> str:
    run = _mode("tensor parallelism, `parallelize_module` after adapting")
    run.model.get_base_model().lm_head.base_layer.weight.requires_grad_()
    return _error(lambda: run.model(input_ids=batch(0)))


def _started_apart() -> list[Tensor]:
    """A and B of an adapter that each process had started by its own seed."""
    run = _mode("tensor parallelism, `parallelize_module` after adapting")
    torch.manual_seed(dist.get_rank())
    for layer in hira.tuner.model.hira_layers(run.model):
        layer.reset_hira_parameters("default", "gaussian")
    run.model(input_ids=batch(0))
    parts = []
    for _, parameter in sorted(factors(run.model).items()):
        found = [torch.empty_like(parameter) for _ in range(WORLD)]
        dist.all_gather(found, parameter.detach())
        parts.append(torch.stack(found))
    return parts


def _called_alone() -> str:
    run = _mode("FSDP2, `fully_shard` of each block")
    layer = run.model.get_base_model().model.layers[0].mlp.up_proj
    return _error(lambda: layer(torch.randn(2, 32)))


def _mixed_batch() -> str:
    run = _mode("FSDP2, each base layer a shard group", adapters=2)
    run.model.eval()
    return _error(lambda: run.model(input_ids=batch(9), adapter_names=["default", "second"] * 2))


def _mixed_batch_zero() -> str:
    """Each process asks for one adapter, but for another."""
    run = _mode("ZeRO-3", adapters=2)
    run.call.eval()
    names = [["default"] * 4, ["second"] * 4][dist.get_rank()]
    error = _error(lambda: run.call(input_ids=batch(9), adapter_names=names))
    run.call.destroy()
    return error


def _added_later() -> list[str]:
    """Adapters of a model whose parameters are in the dicts of ZeRO-3, after one was added and one refused."""
    run = _mode("ZeRO-3")
    run.model.add_adapter("later", hira.HiraConfig(r=2, target_modules=["q_proj"]))
    _error(lambda: run.model.add_adapter("bad", hira.HiraConfig(r=2, target_modules=["mlp"])))
    run.call.destroy()
    return sorted({name.rpartition(".")[2] for name, _ in run.model.named_parameters() if "hira_" in name})


def _trains_too() -> Tensor:
    """The gradient of a base weight that trains, where the base layer is a shard group."""
    from torch.distributed.fsdp import fully_shard

    model = adapted(base_model("llama"), "llama")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.base_layer.weight.requires_grad_()
    fully_shard(layer.base_layer)
    fully_shard(model)
    ids = own_rows(batch(0))
    model(input_ids=ids, labels=ids).loss.backward()
    gradient: Tensor = layer.base_layer.weight.grad.full_tensor()
    return gradient


def _mode(name: str, adapters: int = 1) -> Run:
    spread = next(mode.spread for mode in MODES if mode.name == name)
    return spread("", "llama", adapters, False)


CHECKS: dict[str, Callable[[], Any]] = {
    "torch adapted after fully_shard": _adapted_after_fully_shard,
    "torch not gathered": _not_gathered,
    "torch dropout in parallel": _dropout_in_parallel,
    "torch trained in parallel": _trained_in_parallel,
    "torch started apart": _started_apart,
    "torch called alone": _called_alone,
    "torch mixed batch": _mixed_batch,
    "torch trains too": _trains_too,
    "deepspeed not gathered": _not_gathered_zero,
    "deepspeed mixed batch": _mixed_batch_zero,
    "deepspeed added later": _added_later,
}
