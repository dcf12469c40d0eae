"""What cannot be done with weights that accelerate keeps elsewhere is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from offloaded_models import EXPERTS, IDS, adapt, logits, mixtral
from offloading import CPU, llama
from peft import LoraConfig, PeftMixedModel
from torch import Tensor, nn

from hira import HiraConfig, HiraError
from hira.tuner.model import hira_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("target", ["attn", "attn.out_proj"])
def test_attention_is_refused(target):
    message = "MultiheadAttention.* out_proj"
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
    with pytest.raises(HiraError, match="MixtralExperts"), torch.no_grad():
        model(input_ids=IDS)


def test_quantised_weights_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    message = "Linear4bit"
    adapted = adapt(nn.Sequential(bnb.nn.Linear4bit(64, 64)).to("cpu"), target_modules=["0"])
    add_hook_to_module(adapted.base_model.model[0].base_layer, AlignDevicesHook("cpu", offload=True))
    for run in (lambda: adapted(torch.randn(2, 64)), adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(HiraError, match=message):
            run()
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64)).to("cpu")
    add_hook_to_module(model[0], AlignDevicesHook("cpu", offload=True))
    with pytest.raises(HiraError, match=rf"^0: .*{message}"):
        adapt(model, target_modules=["0"])
    assert not hira_layers(model)


def test_whole_blocks_are_refused():
    blocks = {"preload_module_classes": ["LlamaDecoderLayer"]}
    model = cpu_offload(llama(), CPU, **blocks)
    before = logits(model)
    with pytest.raises(HiraError, match=r"'default'.* model\.layers\.0"):
        adapt(model)
    assert torch.equal(logits(model), before)
    model = cpu_offload(adapt(llama()), CPU, **blocks)
    assert torch.equal(logits(model), logits(adapt(llama())))
    with pytest.raises(HiraError, match="trained"):
        model.train()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match="merged"):
            merge()


def test_a_weight_that_is_nowhere_is_refused():
    model = adapt(nn.Sequential(nn.Linear(6, 4)), target_modules=["0"])
    model.base_model.model[0].base_layer.to("meta")
    with pytest.raises(HiraError, match=r"Linear.* meta"):
        model(torch.randn(2, 6))


def test_modules_to_save_are_refused_where_they_are_away():
    with pytest.raises(HiraError, match=r"modules_to_save.* lm_head"):
        adapt(cpu_offload(llama(), CPU), target_modules=["q_proj"], modules_to_save=["lm_head"])


def test_another_tuners_merge_is_refused(tmp_path: Path):
    model = PeftMixedModel(cpu_offload(llama(), CPU), HiraConfig(target_modules=["q_proj"]))
    model.add_adapter("lora", LoraConfig(target_modules=["o_proj"]))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match="accelerate"):
            merge()
