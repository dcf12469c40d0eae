"""ParamWrapper: stacked experts and other single parameters, through target_parameters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from autograd_memory import address, kept_for_backward
from expert_models import (
    COMMON,
    EXPERTS,
    HIDDEN,
    IMPLEMENTATIONS,
    INTER,
    KINDS,
    E,
    R,
    adapt,
    effective,
    factors_of,
    model_of,
    oracle,
    randomise,
    routed,
    wrapper_of,
)
from oracle import error
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch.nn import functional as F

from hira import HiraConfig, HiraError, ParamWrapper, ops
from hira.layers import lazy_weight
from hira.ops import effective_weight, heuristics, reference

COMMON |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "eos_token_id": 1, "bos_token_id": 1}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_the_equation_and_only_where_there_are_tokens(kind, implementation, monkeypatch):
    model = adapt(model_of(kind, torch.float64), rank_pattern={"down_proj": 2})
    model.base_model.model.set_experts_implementation(implementation)
    wrapper = wrapper_of(model)
    assert (wrapper.parameter_name, wrapper.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert (wrapper.r["default"], wrapper.base_layer.r["default"]) == (2, R)
    x, *route = routed()
    products = []
    monkeypatch.setattr(lazy_weight, "linear", lambda *args, **kw: products.append(args[1]) or ops.linear(*args, **kw))
    monkeypatch.setattr(lazy_weight, "modulated_weight", None)  # W' is not formed but in the products
    y = wrapper(x, *route)
    assert len(products) == 4  # two experts, two parameters
    exact = oracle(wrapper, x, *route)
    torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    inputs = [x, *factors_of(wrapper)]
    found = torch.autograd.grad(y, inputs, dy)
    for gradient, exact_gradient in zip(found, torch.autograd.grad(exact, inputs, dy), strict=True):
        torch.testing.assert_close(gradient, exact_gradient, rtol=1e-10, atol=1e-10)
    dA, dB = found[1].view(E, 2, INTER), found[2].view(HIDDEN, 2, E)
    assert not dA[[1, 3]].any() and not dB[..., [1, 3]].any()
    assert dA[[0, 2]].abs().amin() > 0 and dB[..., [0, 2]].abs().amin() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_nothing_weight_sized_is_kept_for_backward(kind, implementation):
    model = adapt(model_of(kind))
    model.base_model.model.set_experts_implementation(implementation)
    wrapper = wrapper_of(model)
    x, *route = routed(torch.float32)
    kept = kept_for_backward(lambda: wrapper(x, *route))
    base = wrapper.get_base_layer()
    weights = {address(base.gate_up_proj), address(base.down_proj)}
    assert weights <= kept.keys()
    assert all(size < base.down_proj[0].nbytes for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_laid_out_as_loras_and_load_bit_for_bit(kind, tmp_path):
    options = {"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2}}
    lora = get_peft_model(model_of(kind), LoraConfig(r=R, target_parameters=EXPERTS, **options))
    model = adapt(model_of(kind), **options)
    expected = {
        key.replace("lora_", "hira_").removesuffix(".weight"): v for key, v in get_peft_model_state_dict(lora).items()
    }
    state = get_peft_model_state_dict(model)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert any(key.endswith("experts.base_layer.hira_A") for key in state)
    # the places of experts and ranks in A and B are those of LoRA, whose scale is 1 here
    l_wrapper = next(m for m in lora.modules() if type(m).__name__ == "ParamWrapper")
    for ours, theirs in ((w := wrapper_of(model), l_wrapper), (w.base_layer, l_wrapper.base_layer)):
        theirs.scaling["default"] = 1.0
        theirs.lora_A["default"].weight.data = ours.hira_A["default"].data
        theirs.lora_B["default"].weight.data = ours.hira_B["default"].data
        torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
        torch.testing.assert_close(ours.get_additive_delta("default"), effective(ours) - ours.storage.stored)
    ids = torch.arange(12).view(2, 6)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"] == EXPERTS
    y = model.eval()(ids).logits
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(model_of(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded.eval()(ids).logits, y)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    adapt(model_of("mixtral")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    model = model_of("mixtral")
    with pytest.raises(HiraError, match=r"experts\.hira_A\.default.* \(12, 48\)|base_layer"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merging_writes_the_weights_of_the_forward_and_back(kind, dtype, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 500)  # several blocks for each expert
    model = adapt(model_of(kind, dtype))
    wrapper = wrapper_of(model)
    assert wrapper.hira_A["default"].dtype == torch.float32
    base = wrapper.get_base_layer()
    originals = base.gate_up_proj, base.down_proj
    copies = [original.clone() for original in originals]
    # products with unit vectors are exact: they are W'
    with torch.no_grad():
        products = []
        for layer in (wrapper.base_layer, wrapper):
            weight = layer._weight(["default"])
            units = torch.eye(layer.in_features, dtype=dtype)
            rows = [units @ weight[e] if layer._is_transposed else F.linear(units, weight[e]).t() for e in range(E)]
            products.append(torch.stack(rows))
    x, *route = routed(dtype)
    y = wrapper(x, *route)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(base.gate_up_proj, products[0]) and torch.equal(base.down_proj, products[1])
    assert error(wrapper(x, *route), y) < 4 * torch.finfo(dtype).eps
    model.unmerge_adapter()
    assert (base.gate_up_proj, base.down_proj) == originals
    assert all(torch.equal(original, saved) for original, saved in zip(originals, copies, strict=True))
    merged = model.merge_and_unload()
    assert merged.model.layers[0].mlp.experts is base
    assert torch.equal(base.gate_up_proj, products[0]) and torch.equal(base.down_proj, products[1])
    assert not any("hira_" in key or "base_layer" in key for key in merged.state_dict())


def test_unload_gives_the_modules_back_and_a_broken_merge_changes_nothing():
    model = adapt(model_of("mixtral"))
    wrapper = wrapper_of(model)
    base, originals = wrapper.get_base_layer(), wrapper.get_base_layer()._parameters.copy()
    with torch.no_grad():
        wrapper.hira_B["default"][0, 0] = torch.nan
    for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(HiraError, match=r"experts\.down_proj"):
            merge()
        assert all(base._parameters[name] is original for name, original in originals.items())
    assert model.unload().model.layers[0].mlp.experts is base


def test_several_adapters():
    model = adapt(model_of("mixtral", torch.float64))
    model.base_model.model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    model.add_adapter("other", HiraConfig(r=2, target_modules=[], target_parameters=EXPERTS[::-1]))
    randomise(model, "other")
    wrapper, (x, *route) = wrapper_of(model), routed()
    assert [w.parameter_name for w in wrapper._wrappers()] == ["down_proj", "gate_up_proj"]
    y = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        y[len(names), names[0]] = wrapper(x, *route)
        torch.testing.assert_close(y[len(names), names[0]], oracle(wrapper, x, *route, names=names))
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    torch.testing.assert_close(wrapper(x, *route), y[2, "default"])
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(wrapper(x, *route), wrapper.get_base_layer()(x, *route))
    model.set_adapter("other")
    twin = wrapper_of(copy.deepcopy(model))
    assert torch.equal(twin(x, *route), y[1, "other"])
    model.delete_adapter("default")
    assert torch.equal(wrapper(x, *route), y[1, "other"])


def test_matrices_are_parameters_too():
    """The router of Mixtral, which is no linear layer, and the weight of one that is."""
    model = adapt(model_of("mixtral", torch.float64), target_parameters=["mlp.gate.weight", "o_proj.weight"])
    model.base_model.model.set_experts_implementation("eager")
    shapes = {
        key.split("layers.0.")[1]: tuple(v.shape)
        for key, v in get_peft_model_state_dict(model).items()
        if "s.0." in key
    }
    assert shapes == {
        **{"mlp.gate.hira_A": (R, HIDDEN), "mlp.gate.hira_B": (E, R)},
        **{"self_attn.o_proj.hira_A": (R, HIDDEN), "self_attn.o_proj.hira_B": (HIDDEN, R)},
    }
    wrapper = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    y = wrapper(x)
    exact = reference.modulated_weight(wrapper.base_layer.weight, wrapper.hira_A["default"], wrapper.hira_B["default"])
    torch.testing.assert_close(y, x @ exact.t())
    ids = torch.arange(6).view(1, 6)
    logits = model(ids).logits
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, logits)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_model_trains_under_autocast_and_checkpointing(checkpointing):
    model = adapt(model_of("gpt_oss"), target_modules=["q_proj"]).train()
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    exact = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(p.grad, g) for p, g in zip(trained, exact, strict=True))
    else:
        model.base_model.model.set_experts_implementation("eager")
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        assert error(found, torch.cat([g.flatten() for g in exact])) < 0.1


def test_autocast_gives_what_a_plain_product_gives():
    wrapper = wrapper_of(adapt(model_of("mixtral")))
    weight, dense = wrapper._weight(["default"]), effective(wrapper).detach()
    x = torch.randn(5, INTER)
    with torch.autocast("cpu", torch.bfloat16):
        for y, exact in ((F.linear(x, weight[1]), F.linear(x, dense[1])), (x @ weight[1].t(), x @ dense[1].t())):
            assert y.dtype == exact.dtype == torch.bfloat16
            assert error(y, exact) < 2**-8
        offs = torch.tensor([2, 2, 5, 5], dtype=torch.int32)
        y, exact = F.grouped_mm(x, weight.mT, offs=offs), F.grouped_mm(x, dense.mT, offs=offs)
        assert y.dtype == exact.dtype == torch.float32
        assert error(y, exact) < 1e-6  # autocast is not for grouped products


def test_int8_gradients_are_those_of_the_linear_layer():
    wrapper = wrapper_of(adapt(model_of("mixtral"), weight_gradient="int8"))
    x = torch.randn(16, INTER)
    found = torch.autograd.grad(F.linear(x, wrapper._weight(["default"])[2]).sin().sum(), factors_of(wrapper)[:2])
    wrapper.weight_gradient["default"] = "exact"
    exact = torch.autograd.grad(F.linear(x, wrapper._weight(["default"])[2]).sin().sum(), factors_of(wrapper)[:2])
    assert all(0 < error(gradient, g) < 0.05 for gradient, g in zip(found, exact, strict=True))


def test_a_forward_of_the_modules_own_is_called():
    """As accelerate and others set one: bound to the module itself."""
    wrapper = wrapper_of(adapt(model_of("mixtral", torch.float64)))
    base, (x, *route) = wrapper.get_base_layer(), routed()
    y, calls, plain = wrapper(x, *route), [], base.forward
    base.forward = lambda *args: calls.append(args) or plain(*args)
    assert torch.equal(wrapper(x, *route), y) and len(calls) == 1
    assert not {"gate_up_proj", "down_proj"} & base.__dict__.keys()
    base.forward = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        wrapper(x, *route)
    assert not {"gate_up_proj", "down_proj"} & base.__dict__.keys()


def test_what_a_forward_assigns_stays():
    wrapper = wrapper_of(adapt(model_of("mixtral", torch.float64)))
    base, (x, *route) = wrapper.get_base_layer(), routed()
    kind = type(base)

    class Counting(kind):
        def forward(self, x, *args):
            self.calls = getattr(self, "calls", 0) + 1
            self.load = self.load + torch.bincount(args[0].flatten(), minlength=E)
            return super().forward(x, *args)

    y = wrapper(x, *route)
    base.__class__ = Counting
    base.register_buffer("load", torch.zeros(E, dtype=torch.int64))
    assert torch.equal(wrapper(x, *route), y)
    wrapper(x, *route)
    assert base.calls == 2
    assert base.load.tolist() == [12, 0, 12, 0]
    assert "load" in dict(base.named_buffers())


def test_hooks_of_the_module_run():
    wrapper = wrapper_of(adapt(model_of("mixtral", torch.float64)))
    x, *route = routed()
    y = wrapper(x, *route)
    wrapper.get_base_layer().register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(wrapper(x, *route), 2 * y)


def test_an_unknown_implementation_gets_dense_weights(monkeypatch):
    wrapper = wrapper_of(adapt(model_of("mixtral", torch.float64)))
    x, *route = routed()
    y = wrapper(x, *route)
    seen = []

    def kernel(module, *args):
        seen.append(type(module.gate_up_proj))
        return type(module).forward.__wrapped__(module, *args)  # its own loop

    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register("a_kernel", kernel)
    monkeypatch.setattr(wrapper.get_base_layer().config, "_experts_implementation", "a_kernel")
    torch.testing.assert_close(wrapper(x, *route), y)
    assert seen == [torch.Tensor]


def test_compiled_code_breaks_at_the_experts():
    wrapper = wrapper_of(adapt(model_of("mixtral", torch.float64)))
    x, *route = routed()
    compiled = torch.compile(lambda *args: wrapper(*args).sin(), backend="eager")
    y, exact = compiled(x, *route), wrapper(x, *route).sin()
    assert torch.equal(y, exact)
    found, expected = (torch.autograd.grad(z.sum(), factors_of(wrapper)) for z in (y, exact))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_mixed_batches_are_refused_unless_they_ask_for_the_active_adapter():
    model = adapt(model_of("mixtral")).eval()
    ids = torch.arange(12).view(2, 6)
    y = model(ids).logits
    assert torch.equal(model(ids, adapter_names=["default", "default"]).logits, y)
    with pytest.raises(HiraError, match=r"adapter_names.*experts\.\w+_proj"):
        model(ids, adapter_names=["default", "__base__"])


def test_the_merged_weight_is_that_of_one_expert_at_a_time():
    wrapper = wrapper_of(adapt(model_of("mixtral")))
    A, B, _ = wrapper._factors(["default"])
    found = wrapper._effective_weight(wrapper.storage.read(), A, B, 0)
    assert all(
        torch.equal(found[e], effective_weight.form(wrapper.storage.stored[e], A[e], B[e], 0, torch.float32))
        for e in range(E)
    )


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_products_of_a_device_are_those_of_each_expert(kind, lora_r, monkeypatch):
    """On an accelerator all experts are one grouped product, here on a CPU that takes that path."""
    ids = torch.arange(24).view(2, 12)
    found = {}
    for on_device in (False, True):
        monkeypatch.setattr(heuristics, "stacks", lambda tensor, on=on_device: on)
        model = adapt(model_of(kind), lora_r=lora_r)
        model.set_experts_implementation("grouped_mm")
        y = model(ids).logits
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            merged = model.merge_and_unload()(ids).logits
        torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-4)
        found[on_device] = y, gradients
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-3)


def test_few_tokens_are_not_worth_forming_all_experts(monkeypatch):
    monkeypatch.setattr(heuristics, "stacks", lambda tensor: True)
    monkeypatch.setattr(lazy_weight, "grouped_linear", None)
    model = adapt(model_of("mixtral")).eval()
    model.set_experts_implementation("grouped_mm")
    assert model(torch.tensor([[5]])).logits.isfinite().all()  # two of four experts
