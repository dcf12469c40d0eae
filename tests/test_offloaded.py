"""Models whose weights accelerate keeps on a CPU or a disk: as in memory, bit for bit, or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from conftest import kept_for_backward
from offloading import AFTERWARDS, CPU, DEVICES, TARGETS, WAYS, Way, llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from hira import HiraConfig, HiraError
from hira.base_weights import offloaded
from hira.tuner.model import hira_layers

IDS = torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(5))


def each(ways: list[Way]) -> Any:
    return pytest.mark.parametrize("way", ways, ids=lambda way: way.name.split("`")[1].split("(")[0])


ways = each(WAYS)
LOADED = next(way for way in WAYS if "from_pretrained" in way.name)
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def fill(model: nn.Module) -> Any:
    """Give all adapters values, the same for the same names."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapt(model: nn.Module, **options: Any) -> Any:
    return fill(get_peft_model(model, HiraConfig(**{"r": 3, "target_modules": TARGETS} | options)))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def assert_away(model: nn.Module, way: Way) -> None:
    """Between calls the weights are not in the model, but for those that the way leaves there; adapters are."""
    away = [layer.storage.stored.is_meta for layer in hira_layers(model)]
    assert {"all": all(away), "some": any(away) and not all(away), "none": not any(away)}[way.away]
    for layer in hira_layers(model):
        assert not any(factor.is_meta for factors in layer._factor_dicts for factor in factors.values())


def assert_same_training(model: nn.Module, expected: nn.Module, steps: int = 3) -> None:
    optimizers = [torch.optim.SGD(trained(each).values(), lr=0.5) for each in (model, expected)]
    for _ in range(steps):
        losses = []
        for each, optimizer in zip((model, expected), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(each(input_ids=IDS, labels=IDS).loss)
            losses[-1].backward()
        assert torch.equal(*losses)
        found, wanted = trained(model), trained(expected)
        assert found.keys() == wanted.keys()
        for name, parameter in found.items():
            assert wanted[name].grad.any()
            assert torch.equal(parameter.grad, wanted[name].grad), name
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name])


# Training


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


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def mixtral() -> Any:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": None}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


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
    fetch = offloaded.Away.fetch

    def fetching(self: Any, placeholder: Tensor, index: Any = ...) -> Tensor:
        taken.append((self.name, index))
        return fetch(self, placeholder, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloaded.Away, "fetch", fetching)
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
    hook = offloaded.source(model.base_model.model[0].base_layer)
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


# Merging


@ways
def test_merging_and_unmerging(way, tmp_path):
    model, expected = adapt(way.offload(llama(), tmp_path)), adapt(llama())
    with model.disable_adapter():
        plain = logits(model)
    before = [layer.storage.read().clone() for layer in hira_layers(model)]
    identities = [layer.storage.identity()[0] for layer in hira_layers(model) if layer.storage.stored.is_meta]
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        expected.merge_adapter()
        assert_away(model, way)
        for layer, other in zip(hira_layers(model), hira_layers(expected), strict=True):
            assert torch.equal(layer.storage.read(), other.storage.read())
        assert torch.equal(logits(model), logits(expected))
        assert not torch.equal(logits(model), plain)
        model.unmerge_adapter()
        expected.unmerge_adapter()
        for layer, W0 in zip(hira_layers(model), before, strict=True):
            assert torch.equal(layer.storage.read(), W0)
        assert torch.equal(logits(model), logits(expected))
    after = [layer.storage.identity()[0] for layer in hira_layers(model) if layer.storage.stored.is_meta]
    assert all(new is old for new, old in zip(after, identities, strict=True))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@ways
@pytest.mark.parametrize("merge", [True, False])
def test_unloading(way, merge, tmp_path):
    model, expected = adapt(way.offload(llama(), tmp_path)), adapt(llama())
    found, wanted = ((each.merge_and_unload if merge else each.unload)() for each in (model, expected))
    assert not hira_layers(found)
    assert any(parameter.is_meta for parameter in found.parameters()) == (way.away != "none")
    assert torch.equal(logits(found), logits(wanted))
    if merge:
        assert not torch.equal(logits(found), logits(llama()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_merged_model_is_saved_with_what_was_merged(tied, tmp_path):
    bases = llama(), llama()
    for base in bases:
        if tied:
            base.lm_head.weight, base.config.tie_word_embeddings = base.model.embed_tokens.weight, True
    targets = ["q_proj", "lm_head"]
    model = adapt(loaded(tmp_path, bases[0]), target_modules=targets).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    expected = adapt(bases[1], target_modules=targets).merge_and_unload()
    assert not model.config.tie_word_embeddings
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(expected))


def test_several_adapters():
    model, expected = adapt(cpu_offload(llama(), CPU)).eval(), adapt(llama()).eval()
    for each in (model, expected):
        each.add_adapter("b", HiraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        fill(each).base_model.set_adapter(["default", "b"])
    assert torch.equal(logits(model), logits(expected))
    names = ["default", "b"]
    assert torch.equal(logits(model, adapter_names=names), logits(expected, adapter_names=names))
    for names in (["b"], ["default"]):
        model.merge_adapter(names)
        expected.merge_adapter(names)
        assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_merged_then_brought_back():
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    model.merge_adapter()
    expected.merge_adapter()
    remove_hook_from_submodules(model.get_base_model())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_merged_then_offloaded():
    model, expected = adapt(llama()), adapt(llama())
    model.merge_adapter()
    cpu_offload(model, CPU)
    expected.merge_adapter()
    assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_merged_and_offloaded_anew():
    """The second hooks know W' alone; W0 is what was remembered."""
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    model.merge_adapter()
    remove_hook_from_submodules(model.get_base_model())
    cpu_offload(model, CPU)
    assert not torch.equal(logits(model), logits(llama()))
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_a_backward_between_whose_passes_was_a_merge():
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    losses = [each(input_ids=IDS, labels=IDS).loss for each in (model, expected)]
    model.merge_adapter()
    for loss in losses:
        loss.backward()
    for name, parameter in trained(model).items():
        assert torch.equal(parameter.grad, trained(expected)[name].grad)


def test_a_failing_merge_leaves_the_model_as_it_was(monkeypatch):
    model = adapt(cpu_offload(llama(), CPU))
    before = logits(model)
    layers = hira_layers(model)
    maps = [offloaded.source(layer.base_layer).weights_map for layer in layers]
    with torch.no_grad():
        layers[-1]._factor_dicts[0]["default"].fill_(torch.inf)
    with pytest.raises(HiraError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with torch.no_grad():
        layers[-1]._factor_dicts[0]["default"].zero_()
    before = logits(model)
    monkeypatch.setattr(type(layers[-1]), "_effective_weight", _failing(layers[-1]))
    with pytest.raises(RuntimeError, match="on purpose"):
        model.merge_adapter()
    monkeypatch.undo()
    assert all(offloaded.source(layer.base_layer).weights_map is kept for layer, kept in zip(layers, maps, strict=True))
    assert torch.equal(logits(model), before)


def _failing(last: Any) -> Any:
    form = type(last)._effective_weight

    def effective_weight(self: Any, *args: Any) -> Tensor:
        if self is last:
            raise RuntimeError("on purpose")
        return form(self, *args)

    return effective_weight


# Checkpoints


@ways
def test_saving_and_loading(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = adapt(llama())
    adapt(way.offload(llama(), tmp_path / "one")).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(expected))
    base = way.offload(llama(), tmp_path / "two")
    files = sorted(tmp_path.rglob("*"))
    spread = {f"base_model.model.{name}": device for name, device in DEVICES.items()}
    options = {"device_map": spread, "offload_dir": str(tmp_path / "three")}
    for low in (False, True):
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low, **options)
        assert_away(model, way)
        assert torch.equal(logits(model), logits(expected))
        base = model.unload()
    assert sorted(tmp_path.rglob("*")) == files  # the base model's own files are not written anew
    assert not hasattr(base, "hf_device_map") or base.hf_device_map == DEVICES


def loaded(folder: Path, base: nn.Module | None = None) -> nn.Module:
    """A model in part on the disk, as Transformers loads it."""
    return LOADED.offload(llama() if base is None else base, folder)


def test_embeddings_of_a_checkpoint_are_loaded(tmp_path):
    other = llama()
    nn.init.normal_(other.model.embed_tokens.weight)
    adapt(other).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(cpu_offload(llama(), CPU), tmp_path / "adapter")
    assert_away(model, WAYS[0])
    expected = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert not torch.equal(logits(expected), logits(adapt(llama())))
    assert torch.equal(logits(model), logits(expected))


def test_methods_of_transformers(tmp_path):
    adapt(llama()).save_pretrained(tmp_path / "adapter")
    expected = llama()
    expected.add_adapter(HiraConfig(r=3, target_modules=TARGETS))
    fill(expected)
    added, read = loaded(tmp_path), loaded(tmp_path)
    added.add_adapter(HiraConfig(r=3, target_modules=TARGETS))
    assert_same_training(fill(added), expected)
    read.load_adapter(str(tmp_path / "adapter"))
    assert_away(read, LOADED)
    assert torch.equal(logits(read), logits(adapt(llama())))


def test_auto_class(tmp_path):
    base = loaded(tmp_path)
    adapt(base).save_pretrained(tmp_path / "adapter")
    options = {"device_map": DEVICES, "offload_folder": str(tmp_path / "more")}
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert_away(model, LOADED)
    assert torch.equal(logits(model), logits(adapt(llama())))


@each(AFTERWARDS)
def test_adapted_before_it_was_offloaded(way, tmp_path):
    """The adapter is away with the model: good to run, to merge and to save, but not to train."""
    model, expected = way.offload(adapt(llama()), tmp_path / "off"), adapt(llama())
    assert any(f.is_meta for layer in hira_layers(model) for fs in layer._factor_dicts for f in fs.values())
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(HiraError, match=r"^Adapter 'default' is offloaded with the model and cannot be trained there"):
        model(input_ids=IDS)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(expected))
    model.merge_adapter()
    assert torch.equal(logits(model), logits(adapt(llama()).merge_and_unload()))
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


# Around it


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


# Refusals


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("target", ["attn", "attn.out_proj"])
def test_attention_is_refused(target):
    message = "accelerate offloads the weights of MultiheadAttention, but could not bring in those of its out_proj"
    model = cpu_offload(Attention(), CPU)
    with pytest.raises(HiraError, match=message):
        adapt(model, target_modules=[target])
    assert not hira_layers(model)
    model = cpu_offload(adapt(Attention(), target_modules=["attn"]), CPU)
    with pytest.raises(HiraError, match=message), torch.no_grad():
        model(torch.randn(1, 3, 8))


def test_experts_with_a_forward_of_their_own_are_refused():
    base = mixtral()
    for layer in base.model.layers:
        layer.mlp.experts.forward = lambda *args, plain=layer.mlp.experts.forward: plain(*args)
    model = cpu_offload(adapt(base, **EXPERTS), CPU)
    with pytest.raises(HiraError, match=r"^accelerate offloads the parameters of MixtralExperts"), torch.no_grad():
        model(input_ids=IDS)


def test_quantised_weights_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    message = "accelerate offloads the weight of Linear4bit, which is quantised"
    adapted = adapt(nn.Sequential(bnb.nn.Linear4bit(64, 64)).to("cpu"), target_modules=["0"])
    add_hook_to_module(adapted.base_model.model[0].base_layer, AlignDevicesHook("cpu", offload=True))
    for run in (lambda: adapted(torch.randn(2, 64)), adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(HiraError, match=message):
            run()
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64)).to("cpu")
    add_hook_to_module(model[0], AlignDevicesHook("cpu", offload=True))
    with pytest.raises(HiraError, match=f"^0: {message}"):
        adapt(model, target_modules=["0"])
    assert not hira_layers(model)


def test_whole_blocks_are_refused():
    blocks = {"preload_module_classes": ["LlamaDecoderLayer"]}
    model = cpu_offload(llama(), CPU, **blocks)
    before = logits(model)
    with pytest.raises(HiraError, match=r"'default' cannot be added: accelerate brings model\.layers\.0 in as a whole"):
        adapt(model)
    assert torch.equal(logits(model), before)
    model = cpu_offload(adapt(llama()), CPU, **blocks)
    assert torch.equal(logits(model), logits(adapt(llama())))
    with pytest.raises(HiraError, match=r"^Adapters cannot be trained"):
        model.train()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match=r"^Adapters cannot be merged"):
            merge()


def test_a_weight_that_is_nowhere_is_refused():
    model = adapt(nn.Sequential(nn.Linear(6, 4)), target_modules=["0"])
    model.base_model.model[0].base_layer.to("meta")
    with pytest.raises(HiraError, match=r"^The weight of Linear is on the meta device"):
        model(torch.randn(2, 6))


def test_modules_to_save_are_refused_where_they_are_away():
    with pytest.raises(HiraError, match=r"^modules_to_save names lm_head, which accelerate offloads"):
        adapt(cpu_offload(llama(), CPU), target_modules=["q_proj"], modules_to_save=["lm_head"])


def test_another_tuners_merge_is_refused(tmp_path: Path):
    model = PeftMixedModel(cpu_offload(llama(), CPU), HiraConfig(target_modules=["q_proj"]))
    model.add_adapter("lora", LoraConfig(target_modules=["o_proj"]))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match="cannot be merged into a weight that accelerate offloads"):
            merge()
