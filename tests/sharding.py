"""Ways of spreading a model over processes: the modes of test_sharding.py, and of the table in docs/sharding.md.

The functions here run in each of two processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import hira

WORLD, STEPS, RATE = 2, 3, 0.5
CHECKPOINT = "base"  # of the Llama, in the folder of results
BLOCK_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {
    "llama": [*BLOCK_TARGETS, "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],  # `Conv1D`, stored as (in, out)
}


def base_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of two layers, equal in all processes."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model: Any
    if kind == "gpt2":
        config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, use_cache=False)
        config.bos_token_id = config.eos_token_id = None
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
        model = GPT2LMHeadModel(config)
    else:
        options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
        config = LlamaConfig(vocab_size=96, num_attention_heads=4, num_key_value_heads=2, use_cache=False, **options)
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype)


def adapted(model: Any, kind: str, adapters: int = 1, **options: Any) -> PeftModel:
    """The model with adapters whose A and B are not zero and equal in all processes; all of them active.

    The second has a LoRA beside HiRA.
    """
    names = ["default", "second"][:adapters]
    for rank, name in enumerate(names, 2):
        lora_r = rank - 2
        config = hira.HiraConfig(
            r=rank, lora_r=lora_r, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", **options
        )
        model = get_peft_model(model, config) if name == "default" else model
        if name != "default":
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(factors(model).items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B by their names in a model that is not wrapped."""
    parts = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
    found = {}
    for name, parameter in model.named_parameters():
        for part in parts:
            name = name.replace(part, "")
        if "hira_" in name:
            found[name] = parameter
    return found


def checkpointing(model: Any, on: bool) -> None:
    if on:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def blocks(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return base.model.layers if hasattr(base, "model") else base.transformer.h


def batch(step: int) -> Tensor:
    return torch.randint(0, 96, (4, 6), generator=torch.Generator().manual_seed(100 + step))


def own_rows(ids: Tensor) -> Tensor:
    """The rows of a process where data is divided."""
    return ids.chunk(WORLD)[torch.distributed.get_rank()]


@dataclass
class Run:
    """A model that is spread over processes, and how it trains.

    Args:
        model: the PeftModel.
        call: what is called, the model or a wrapper of it.
        optimiser: None where the engine has it.
        state_dict: gathers what `save_pretrained` gets; None where it needs nothing.
        whole: a context in which parameters and gradients are whole.
        value, gradient: a parameter's, whole.
    """

    model: Any
    call: Any
    optimiser: torch.optim.Optimizer | None = None
    state_dict: Callable[[], dict[str, Tensor]] | None = None
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext
    value: Callable[[Any], Tensor] = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    gradient: Callable[[Any], Tensor] = lambda p: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad

    def __post_init__(self) -> None:
        if self.optimiser is None and not hasattr(self.call, "backward"):
            self.optimiser = optimiser(self.call)

    def backward(self, loss: Tensor) -> None:
        loss.backward() if self.optimiser is not None else self.call.backward(loss)

    def step(self) -> None:
        if self.optimiser is None:
            self.call.step()
        else:
            self.optimiser.step()
            self.optimiser.zero_grad()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


# How a model is spread. Each takes the folder of results, the kind of model, the number of adapters, and whether
# activations are recomputed in backward.


def ddp(folder: str, kind: str, adapters: int, checkpoint: bool) -> Run:
    model = adapted(base_model(kind), kind, adapters)
    checkpointing(model, checkpoint)
    return Run(model, nn.parallel.DistributedDataParallel(model))


def fsdp2(
    folder: str, kind: str, adapters: int, checkpoint: bool, dtype: torch.dtype = torch.float32, own: bool = False
) -> Run:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = adapted(base_model(kind, dtype), kind, adapters)
    checkpointing(model, checkpoint)
    if own:
        for layer in hira.tuner.model.hira_layers(model):
            fully_shard(layer.get_base_layer())
    for block in blocks(model):
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return Run(model, model, state_dict=lambda: get_model_state_dict(model, options=options))


def fsdp1(folder: str, kind: str, adapters: int, checkpoint: bool, peft_policy: bool = False) -> Run:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = adapted(base_model(kind), kind, adapters)
    checkpointing(model, checkpoint)
    block = type(blocks(model)[0])
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block.__name__
    policy = fsdp_auto_wrap_policy(model) if peft_policy else ModuleWrapPolicy({block})
    wrapped: Any = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))

    def state_dict() -> dict[str, Tensor]:
        with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)):
            return wrapped.state_dict()

    return Run(model, wrapped, state_dict=state_dict, whole=partial(FSDP.summon_full_params, wrapped, with_grads=True))


def zero(folder: str, kind: str, adapters: int, checkpoint: bool, stage: int, init: bool = False) -> Run:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = zero_config(stage)
    keep = HfDeepSpeedConfig(config) if init else None  # from_pretrained then shards each weight as it is loaded
    base = LlamaForCausalLM.from_pretrained(f"{folder}/{CHECKPOINT}") if init else base_model(kind)
    assert not init or hasattr(base.lm_head.weight, "ds_id")
    del keep
    model = adapted(base, kind, adapters)
    checkpointing(model, checkpoint)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser(model), config=config)
    gathered = engine._zero3_consolidated_16bit_state_dict if stage == 3 else None  # Accelerate's way
    return Run(model, engine, state_dict=gathered, value=safe_get_full_fp32_param, gradient=safe_get_full_grad)


def zero_config(stage: int) -> dict[str, Any]:
    """Nothing stays gathered: weights of this size otherwise would."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def tensor_parallel(folder: str, kind: str, adapters: int, checkpoint: bool, adapt_first: bool = True) -> Run:
    model: Any = base_model(kind)
    if adapt_first:
        model = adapted(model, kind, adapters)
    divide(model.get_base_model() if adapt_first else model, ".base_layer" if adapt_first else "")
    if not adapt_first:
        model = adapted(model, kind, adapters)
    checkpointing(model, checkpoint)
    return Run(model, model)


def divide(model: Any, suffix: str) -> None:
    """Divide a Llama by PyTorch's styles: all linear layers, the embedding and the output layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {
        f"model.embed_tokens{suffix}": RowwiseParallel(input_layouts=Replicate()),
        f"lm_head{suffix}": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.model.layers)):
        for name in BLOCK_TARGETS:
            part = "self_attn" if name in BLOCK_TARGETS[:4] else "mlp"
            style = RowwiseParallel() if name in ("o_proj", "down_proj") else ColwiseParallel()
            plan[f"model.layers.{i}.{part}.{name}{suffix}"] = style
    parallelize_module(model, init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",)), plan)


def transformers_tensor_parallel(folder: str, kind: str, adapters: int, checkpoint: bool) -> Run:
    from torch.distributed.tensor import DTensor
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=WORLD)
    base = LlamaForCausalLM.from_pretrained(f"{folder}/{CHECKPOINT}", distributed_config=config)
    assert isinstance(base.model.layers[0].mlp.up_proj.weight, DTensor)
    model = adapted(base, kind, adapters)
    checkpointing(model, checkpoint)
    return Run(model, model)


@dataclass(frozen=True)
class ShardingMode:
    """One way of spreading a model over processes.

    Args:
        name: as it stands in the table.
        family: the processes that it runs in, "torch" or "deepspeed".
        package: the distribution that it comes from.
        spread: makes the run.
        models: kind and number of adapters of each model that it is tested with.
        save: how a state dict is gathered for `save_pretrained`, for the table.
        whole_batch: whether every process sees all rows.
        dtype: of the base weights; A and B are float32.
        most_gathered: how many adapted weights of a Llama are whole at once at most; None where they always are, or
            where each process has its own part.
        generates: whether `generate` runs on it.
    """

    name: str
    family: str
    package: str
    spread: Callable[..., Run]
    models: tuple[tuple[str, int], ...] = (("llama", 1), ("gpt2", 2))
    save: str = "`save_pretrained`"
    whole_batch: bool = False
    dtype: torch.dtype = torch.float32
    most_gathered: int | None = None
    generates: bool = True

    @property
    def merges(self) -> bool:
        """Whether every process has the weights to merge into."""
        return self.most_gathered is None and not self.whole_batch


FULL = "`get_model_state_dict`, full, then `save_pretrained`"
FULL_FSDP1 = "`FULL_STATE_DICT`, then `save_pretrained`"
ACCELERATE = "`accelerator.get_state_dict`, then `save_pretrained`"
LLAMAS = (("llama", 1), ("llama", 2))
BLOCK = len(BLOCK_TARGETS) + 2  # weights of a block, with the embedding and the output layer of the root's shard group
TWO_BLOCKS = BLOCK + len(BLOCK_TARGETS)  # FSDP1 gathers the next block of the backward beforehand

MODES = (
    ShardingMode("DDP", "torch", "torch", ddp),
    ShardingMode("FSDP2, `fully_shard` of each block", "torch", "torch", fsdp2, save=FULL, most_gathered=BLOCK),
    ShardingMode(
        "FSDP2, bfloat16 base, float32 adapters",
        "torch",
        "torch",
        partial(fsdp2, dtype=torch.bfloat16),
        models=(("llama", 1),),
        save=FULL,
        dtype=torch.bfloat16,
        most_gathered=BLOCK,
    ),
    ShardingMode(
        "FSDP2, each base layer a shard group",
        "torch",
        "torch",
        partial(fsdp2, own=True),
        save=FULL,
        most_gathered=1,
    ),
    ShardingMode(
        "FSDP1, `use_orig_params=True`",
        "torch",
        "torch",
        fsdp1,
        save=FULL_FSDP1,
        most_gathered=TWO_BLOCKS,
        generates=False,
    ),
    ShardingMode(
        "FSDP1, PEFT's `fsdp_auto_wrap_policy`, `use_orig_params=True`",
        "torch",
        "torch",
        partial(fsdp1, peft_policy=True),
        save=FULL_FSDP1,
        most_gathered=TWO_BLOCKS,
        generates=False,
    ),
    ShardingMode(
        "tensor parallelism, `parallelize_module` after adapting",
        "torch",
        "torch",
        tensor_parallel,
        models=LLAMAS,
        whole_batch=True,
    ),
    ShardingMode(
        "tensor parallelism, `parallelize_module` before adapting",
        "torch",
        "torch",
        partial(tensor_parallel, adapt_first=False),
        models=LLAMAS,
        whole_batch=True,
    ),
    ShardingMode(
        "tensor parallelism, Transformers' `DistributedConfig(tp_size=...)`",
        "torch",
        "transformers",
        transformers_tensor_parallel,
        models=LLAMAS,
        whole_batch=True,
    ),
    ShardingMode("ZeRO-2", "deepspeed", "deepspeed", partial(zero, stage=2)),
    ShardingMode("ZeRO-3", "deepspeed", "deepspeed", partial(zero, stage=3), save=ACCELERATE, most_gathered=1),
    ShardingMode(
        "ZeRO-3, weights sharded as they are loaded (`zero.Init`)",
        "deepspeed",
        "deepspeed",
        partial(zero, stage=3, init=True),
        models=LLAMAS,
        save=ACCELERATE,
        most_gathered=1,
    ),
)
