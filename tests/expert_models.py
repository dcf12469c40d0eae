"""Mixtures of experts, adapted, and the equation for each of their experts."""

from __future__ import annotations

import copy

import torch
import transformers
from peft import get_peft_model
from torch import nn

from hira import HiraConfig, ParamWrapper

E, R, HIDDEN, INTER = 4, 3, 32, 48
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]  # all that run on a CPU
COMMON = {"vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": 2, "pad_token_id": 0}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**COMMON, intermediate_size=INTER, num_local_experts=E)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**COMMON, moe_intermediate_size=INTER, num_experts=E)
    else:
        layers = {"layer_types": ["full_attention"] * 2}
        config = transformers.GptOssConfig(**COMMON, **layers, intermediate_size=INTER, num_local_experts=E)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def adapt(model, **options):
    peft_model = get_peft_model(
        model, HiraConfig(**{"r": R, "target_modules": [], "target_parameters": EXPERTS} | options)
    )
    return randomise(peft_model)


def randomise(model, name="default"):
    for key, parameter in model.named_parameters():
        if key.endswith((f"hira_A.{name}", f"hira_B.{name}")):
            nn.init.normal_(parameter, std=0.3)
    return model


def wrapper_of(model):
    """The outer wrapper, of down_proj; its base_layer is that of gate_up_proj."""
    return next(module for module in model.modules() if isinstance(module, ParamWrapper))


def routed(dtype=torch.float64, experts=(2, 0)):
    """Tokens x (6, in), the experts of each, and their weights; experts 1 and 3 get no token."""
    x = torch.randn(6, HIDDEN, dtype=dtype, requires_grad=True)
    ids = torch.tensor([[experts[0], experts[1]]] * 5 + [[experts[1], experts[0]]])
    return x, ids, torch.rand(6, 2, dtype=dtype)


def effective(wrapper, names=("default",)):
    """W' as the equation has it, in the parameter's own layout, expert by expert, from the layout of A and B."""
    W0 = wrapper.storage.stored
    matrices = []
    for e in range(len(W0)):
        BA = 0
        for name in names:
            A, B = wrapper.hira_A[name], wrapper.hira_B[name]
            r = wrapper.r[name]
            BA = BA + sum(torch.outer(B[:, k * len(W0) + e], A[e * r + k]) for k in range(r))
        matrices.append(W0[e] * (1 + (BA.t() if getattr(wrapper.get_base_layer(), "is_transposed", False) else BA)))
    return torch.stack(matrices)


def oracle(wrapper, *args, names=("default",)):
    """The module's own loop over experts with W' in the place of both parameters."""
    base = copy.deepcopy(wrapper.get_base_layer())
    base.config._experts_implementation = "eager"
    weights = {w.parameter_name: effective(w, names) for w in (wrapper, wrapper.base_layer)}
    return torch.func.functional_call(base, weights, args)


def factors_of(wrapper, name="default"):
    return [factors[name] for w in (wrapper, wrapper.base_layer) for factors in (w.hira_A, w.hira_B)]
