"""Input and output embeddings that share one weight, adapted on either side or on both."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

IDS = torch.tensor([[1, 5, 9, 3]])
SMALL = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, n_positions=8, **special))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=8))


def t5() -> nn.Module:
    sizes = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True))


# the model, its embeddings that share a weight, and the adapted ones among them
CASES = [
    (make, tied, targets)
    for make, tied in (
        (llama, ("model.embed_tokens", "lm_head")),
        (gpt2, ("transformer.wte", "lm_head")),
        (bert, ("bert.embeddings.word_embeddings", "cls.predictions.decoder")),
        (t5, ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    )
    for targets in (tied[:1], tied[-1:], tied)
]
every_case = pytest.mark.parametrize(
    ("make", "tied", "targets"), CASES, ids=[f"{make.__name__}: {', '.join(targets)}" for make, _, targets in CASES]
)


def logits(model: nn.Module) -> Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


def adapted(make: Any, targets: tuple[str, ...]) -> PeftModel:
    torch.manual_seed(0)
    pattern = "|".join(name.replace(".", r"\.") for name in targets)
    config = peft.HiraConfig(r=2, target_modules=f"({pattern})", init_weights=False)
    return get_peft_model(make().eval(), config).eval()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    # outputs of one model by two orders of the same float32 operations
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@every_case
def test_merging_and_unmerging(make, tied, targets):
    model = adapted(make, targets)
    layers = {name: getattr(m := model.base_model.model.get_submodule(name), "base_layer", m) for name in tied}
    shared = layers[tied[0]].weight
    assert all(layer.weight is shared for layer in layers.values())
    W0, y = shared.detach().clone(), logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert_close(logits(model), y)
        for name, layer in layers.items():
            assert (layer.weight is shared) == (name not in targets)
            assert torch.equal(layer.weight, W0) == (name not in targets)
        model.unmerge_adapter()
        assert all(layer.weight is shared for layer in layers.values())
        assert torch.equal(shared, W0)
        assert torch.equal(logits(model), y)


@every_case
def test_saved_and_loaded(make, tied, targets, tmp_path):
    model = adapted(make, targets)
    y = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), y)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make().eval(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), y)
    merged = model.merge_and_unload()
    assert_close(logits(merged), y)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), logits(merged))
