"""Models whose weights accelerate keeps on a CPU or a disk: as in memory, bit for bit, or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from autograd_memory import kept_for_backward
from offloaded_models import (
    EXPERTS,
    IDS,
    adapt,
    assert_away,
    assert_same_training,
    logits,
    mixtral,
    trained,
    ways,
)
from offloading import CPU, TARGETS, llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hira import HiraConfig
from hira.base_weights import offloaded
from hira.tuner.model import hira_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@ways
def test_training_is_that_of_the_model_in_memory(way, tmp_path):
    model, expected = adapt(way.offload(llama(), tmp_path)), adapt(llama())
    assert_away(model, way)
    assert torch.equal(logits(model), logits(expected))
    assert_same_training(model.train(), expected.train())
    assert_away(model, way)


@ways
def test_training_goes_on_from_a_checkpoint(way, tmp_path):
    adapt(llama()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(way.offload(llama(), tmp_path), tmp_path / "adapter", is_trainable=True)
    assert_away(model, way)
    assert_same_training(model, adapt(llama()))


def test_gradient_checkpointing():
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    for each in (model, expected):
        each.train()
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.enable_input_require_grads()
    assert_same_training(model, expected, steps=1)


@pytest.mark.parametrize("options", [{"hira_dropout": 0.5}, {"weight_gradient": "int8"}], ids=str)
def test_options_of_the_adapter(options):
    model, expected = adapt(cpu_offload(llama(), CPU), **options), adapt(llama(), **options)
    losses = []
    for each in (model, expected):
        torch.manual_seed(1)
        losses.append(each.train()(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    if "hira_dropout" not in options:
        assert torch.equal(*losses)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, trained(expected)[name].grad)


class Layers(nn.Module):
    """A layer of each kind, with a bias where there can be one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=2, max_norm=1.5)
        self.linear = nn.Linear(6, 8)
        self.conv1d = Conv1D(6, 8)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.conv1d(self.linear(self.table(ids)))
        return self.depthwise(self.conv(y.transpose(1, 2)))


KINDS = ["table", "linear", "conv1d", "conv", "depthwise"]


def test_every_kind_of_layer():
    base = Layers()
    model = adapt(cpu_offload(copy.deepcopy(base), CPU), target_modules=KINDS)
    expected = adapt(base, target_modules=KINDS)
    ids = torch.randint(0, 11, (2, 5))
    assert len(hira_layers(model)) == len(KINDS)
    assert all(layer.storage.stored.is_meta for layer in hira_layers(model))
    outputs = [each(ids) for each in (model, expected)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for name, parameter in trained(model).items():
        assert parameter.grad.any()
        assert torch.equal(parameter.grad, trained(expected)[name].grad), name
    for layer, other in zip(hira_layers(model), hira_layers(expected), strict=True):
        layer.merge()
        other.merge()
        assert torch.equal(layer.storage.read(), other.storage.read())
    assert torch.equal(model(ids), expected(ids))


@ways
@pytest.mark.parametrize("parameters", [slice(0, 2), slice(1, 2)], ids=["both", "one"])
def test_experts(way, parameters, tmp_path):
    options = {**EXPERTS, "target_parameters": EXPERTS["target_parameters"][parameters]}
    model, expected = adapt(way.offload(mixtral(), tmp_path), **options), adapt(mixtral(), **options)
    assert_away(model, way)
    assert torch.equal(logits(model), logits(expected))
    assert_same_training(model.train(), expected.train())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(mixtral()))
    for change in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        for each in (model, expected):
            getattr(each, change)()
        assert torch.equal(logits(model), logits(expected))
    unmerged = [each.unload() for each in (model, expected)]
    assert torch.equal(*map(logits, unmerged))


def test_experts_without_a_token_stay_away():
    model = adapt(cpu_offload(mixtral(), CPU), **EXPERTS, r=1)
    experts = model.base_model.model.model.layers[0].mlp.experts
    base, taken = experts.get_base_layer(), []
    fetch = offloaded.OffloadedTensor.fetch

    def fetching(self: Any, placeholder: Tensor, index: Any = ...) -> Tensor:
        taken.append((self.name, index))
        return fetch(self, placeholder, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloaded.OffloadedTensor, "fetch", fetching)
        x, ids, weights = torch.randn(3, 16), torch.tensor([[2], [0], [2]]), torch.rand(3, 1)
        storages = kept_for_backward(lambda: experts(x, ids, weights))
    assert set(taken) == {(name, e) for name in ("gate_up_proj", "down_proj") for e in (0, 2)}
    storages.pop(0)
    assert max(storages.values()) < base.down_proj[0].nbytes


class Counting(Mapping[str, Tensor]):
    """A mapping that counts how often a tensor is taken from it."""

    def __init__(self, mapping: Mapping[str, Tensor]) -> None:
        self.mapping, self.taken = mapping, []

    def __getitem__(self, name: str) -> Tensor:
        self.taken.append(name)
        return self.mapping[name]

    def __iter__(self) -> Any:
        return iter(self.mapping)

    def __len__(self) -> int:
        return len(self.mapping)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(64, 64), (3, 64)), (Conv1D(64, 64), (3, 64)), (nn.Conv1d(64, 64, 3), (1, 64, 3))],
    ids=["linear", "conv1d", "conv"],
)
def test_nothing_of_the_weights_size_is_kept_for_backward(layer, x):
    nbytes = layer.weight.nbytes
    model = adapt(cpu_offload(nn.Sequential(copy.deepcopy(layer)), CPU), target_modules=["0"], r=1)
    hook = offloaded.offloading_hook(model.base_model.model[0].base_layer)
    hook.weights_map = Counting(hook.weights_map)
    kept = []

    def run() -> Tensor:
        kept.append(model(torch.randn(x, requires_grad=True)))
        return kept[-1]

    storages = kept_for_backward(run)
    storages.pop(0)  # the placeholder's
    assert storages
    assert max(storages.values()) < nbytes / 4
    assert hook.weights_map.taken.count("weight") == 1
    kept[0].sum().backward()
    assert hook.weights_map.taken.count("weight") == 2


def test_generation():
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    found, wanted = (
        each.eval().generate(input_ids=IDS, max_new_tokens=6, do_sample=False) for each in (model, expected)
    )
    assert found.shape == (2, 13)
    assert torch.equal(found, wanted)


def test_offloaded_as_one_piece_when_asked():
    """accelerate moves the whole model, adapter and all, and none of its weights are on the meta device."""
    model, expected = adapt(llama()), adapt(llama())
    model, hook = cpu_offload_with_hook(model, CPU)
    assert_same_training(model, expected)
    hook.offload()
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("low", [False, True])
def test_initialised_on_the_meta_device(low):
    expected = adapt(llama())
    with torch.device("meta"):
        base = LlamaForCausalLM(expected.config)
    model = get_peft_model(base, HiraConfig(r=3, target_modules=TARGETS), low_cpu_mem_usage=low)
    assert all(parameter.is_meta for parameter in model.parameters()) or not low
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    model.get_base_model().model.rotary_emb = llama().model.rotary_emb  # its buffers are in no state dict
    assert_same_training(model, expected)


def test_inputs_are_moved_to_the_execution_device():
    """On the meta device here, which needs no second one: numbers apart, it is a device as any other."""
    model = adapt(nn.Sequential(nn.Linear(6, 4)), target_modules=["0"])
    layer = model.base_model.model[0]
    add_hook_to_module(layer.base_layer, AlignDevicesHook("meta"))
    add_hook_to_module(layer.base_layer, AlignDevicesHook("meta"), append=True)
    layer.to("meta")
    assert layer._is_plain()
    assert model(torch.randn(3, 6)).device.type == "meta"


def test_compiled():
    model = adapt(cpu_offload(nn.Sequential(nn.Linear(8, 8)), CPU), target_modules=["0"])
    x, gradients = torch.randn(3, 8), []
    for each in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        each(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in trained(model).values()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), torch.compile(model, backend="aot_eager")(x))


def test_another_hook_is_run():
    class Doubling(AlignDevicesHook):
        no_grad = True

    model = adapt(nn.Sequential(nn.Linear(6, 4)), target_modules=["0"])
    layer = model.base_model.model[0]
    assert layer._is_plain()
    add_hook_to_module(layer.base_layer, Doubling())
    assert not layer._is_plain()
