"""`adapter_names`: rows of one batch under different adapters, through whole models and generate()."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from peft import get_peft_model
from stock_peft import stock_peft
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import hira
from hira import HiraConfig

IDS = torch.tensor([[1, 5, 9, 13], [1, 6, 7, 8], [1, 40, 30, 20], [1, 3, 3, 4], [1, 11, 12, 14]])
NAMES = ["high", "low", "__base__", "high", "low"]
# outputs of one model for a row alone and in a batch, in float64
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None))


def strong(model: nn.Module) -> nn.Module:
    """Adapters so large that they change what a model generates."""
    for name, parameter in model.named_parameters():
        if "hira_" in name:
            nn.init.normal_(parameter, std=2.0)
    return model.double().eval()


def two_adapters(model: nn.Module, *targets: str, **options) -> peft.PeftModel:
    """`high` on all targets, `low` on the first alone."""
    model = peft.get_peft_model(model, peft.HiraConfig(r=3, target_modules=list(targets), **options), "high")
    model.add_adapter("low", peft.HiraConfig(r=1, target_modules=[targets[0]], **options))
    return strong(model)


def adapted_llama() -> peft.PeftModel:
    return two_adapters(llama(), "q_proj", "down_proj", "embed_tokens")


def logits(model: nn.Module, ids: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def by_rows(model: peft.PeftModel, run, ids: Tensor, names: list[str]) -> list[Tensor]:
    """What each row alone gives under its adapter."""
    rows = []
    for row, name in zip(ids.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(row))
        else:
            model.set_adapter(name)
            rows.append(run(row))
    model.set_adapter("high")
    return rows


def test_each_row_is_under_its_adapter():
    """Row 2 of the peer's faults: PEFT gives every row the active adapter, __base__ rows too."""
    with stock_peft():
        stock = adapted_llama()
        assert torch.equal(logits(stock, IDS, adapter_names=NAMES), logits(stock, IDS))
    model = adapted_llama()
    expected = torch.cat(by_rows(model, lambda row: logits(model, row), IDS, NAMES))
    found = logits(model, IDS, adapter_names=NAMES)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, logits(model, IDS), **CLOSE)


@pytest.mark.parametrize("name", ["high", "low", "__base__"])
def test_one_adapter_for_all_rows(name):
    model = adapted_llama()
    expected = torch.cat(by_rows(model, lambda row: logits(model, row), IDS, [name] * len(IDS)))
    torch.testing.assert_close(logits(model, IDS, adapter_names=[name] * len(IDS)), expected, **CLOSE)


def test_hooks_are_gone_afterwards():
    model = adapted_llama()
    before = logits(model, IDS)
    logits(model, IDS, adapter_names=NAMES)
    assert torch.equal(logits(model, IDS), before)
    with pytest.raises(hira.HiraError):
        logits(model, IDS, adapter_names=NAMES[:2])
    assert torch.equal(logits(model, IDS), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modules_to_save_follow_their_rows():
    model = two_adapters(llama(), "q_proj", modules_to_save=["lm_head"])
    for head in model.base_model.model.lm_head.modules_to_save.values():
        nn.init.normal_(head.weight)
    expected = torch.cat(by_rows(model, lambda row: logits(model, row), IDS, NAMES))
    torch.testing.assert_close(logits(model, IDS, adapter_names=NAMES), expected, **CLOSE)


def flops(run) -> int:
    """Products in place are counted too, which the counter does not do by itself."""

    def in_place(_, a, b, **__):
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "names", [["one"] * 6, ["one", "two"] * 3, ["one", "two", "__base__"] * 2], ids=["1", "2", "2 and base"]
)
def test_a_batch_costs_one_product_for_each_adapter(names):
    """2 T m n for all rows together, and for each adapter 2 (r + 1) m n to form its weight."""
    m, n, r, t = 40, 56, 3, 16
    body = nn.Sequential(nn.Linear(n, m))
    model = peft.get_peft_model(body, peft.HiraConfig(r=r, target_modules=["0"], init_weights=False), "one")
    model.add_adapter("two", peft.HiraConfig(r=r, target_modules=["0"], init_weights=False))
    model.eval()
    x = torch.randn(len(names), t, n)
    adapters = len(set(names) - {"__base__"})
    cost = flops(lambda: model(x, adapter_names=names))
    product = 2 * len(names) * t * m * n
    assert product <= cost <= product + adapters * 2 * (r + 1) * m * n
    assert product == flops(lambda: body[0].base_layer(x))


@pytest.mark.parametrize("where", ["argument", "GenerationConfig", "model's generation_config"])
@pytest.mark.parametrize(
    "repeats",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_generate(kind, repeats, where):
    """In generate() every sample is there once for each beam or returned sequence, but in an encoder once."""
    model = adapted_llama() if kind == "decoder" else two_adapters(t5(), "q", "wo", "v")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "top_k": 1, **repeats}
    if where == "GenerationConfig":
        options = {"generation_config": GenerationConfig(**model.generation_config.to_diff_dict() | options)}
    elif where != "argument":
        model.get_base_model().generation_config.update(**options)
        options = {}

    def generate(ids: Tensor, **more) -> Tensor:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)

    expected = torch.cat(by_rows(model, generate, IDS, NAMES))
    assert torch.equal(generate(IDS, adapter_names=NAMES), expected)
    assert not torch.equal(generate(IDS), expected)
    assert "_expand_inputs_for_generation" not in vars(model.get_base_model())


def test_generate_of_a_compiled_model():
    model = adapted_llama()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False, "adapter_names": NAMES}
    expected = model.generate(input_ids=IDS, **options)
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)


@pytest.mark.parametrize("rows", [10, 4])
def test_rows_that_nobody_repeated_are_refused(rows):
    """Outside of generate() two rows for each name may be any two."""
    with pytest.raises(hira.HiraError, match=rf"\b5\b.*\b{rows}\b"):
        logits(adapted_llama(), IDS.repeat(2, 1)[:rows], adapter_names=NAMES)


def test_bad_names_are_refused():
    model = adapted_llama()
    before = logits(model, IDS)
    with pytest.raises(hira.HiraError, match="'nope'"):
        logits(model, IDS, adapter_names=["nope", *NAMES[1:]])
    with pytest.raises(hira.HiraError, match=r"model\.embed_tokens"):
        logits(model, IDS, adapter_names=["high", "low"])
    model.train()
    with pytest.raises(hira.HiraError, match=r"adapter_names.* training"):
        logits(model, IDS, adapter_names=NAMES)
    model.eval().merge_adapter(["high"])
    with pytest.raises(hira.HiraError, match=r"'high'.* unmerge_adapter"):
        logits(model, IDS, adapter_names=NAMES)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), before)


def test_single_tokens_share_one_product():
    """And rows that are no single token of an adapter, and base rows, go their own way."""
    layer = hira.Linear(nn.Linear(6, 5), "a", hira.HiraConfig(r=2, init_weights=False))
    layer.update_layer("b", 3, hira.HiraConfig(init_weights=False))
    layer.update_layer("c", 1, hira.HiraConfig(init_weights=False))
    layer.eval()
    for names in (["a", "b", "c"], ["b", "__base__", "c", "b", "a"], ["c", "__base__", "__base__", "a"]):
        for shape in ((len(names), 6), (len(names), 1, 6)):
            x = torch.randn(shape)
            alone = [layer(x[i : i + 1], adapter_names=[name]) for i, name in enumerate(names)]
            torch.testing.assert_close(layer(x, adapter_names=names), torch.cat(alone))


def test_generate_leaves_a_models_own_expansion_and_serves_threads():
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    base = LlamaForCausalLM(config)
    calls = []
    of_class = base._expand_inputs_for_generation
    own = lambda **kwargs: (calls.append(1), of_class(**kwargs))[1]  # noqa: E731
    base._expand_inputs_for_generation = own
    model = get_peft_model(base, HiraConfig(r=2, target_modules=["q_proj"], init_weights=False)).eval()
    ids = torch.ones(2, 3, dtype=torch.long)

    def run(_):
        names = ["default", "__base__"]
        return model.generate(
            input_ids=ids, adapter_names=names, max_new_tokens=3, num_return_sequences=2, num_beams=2, pad_token_id=0
        )

    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(run, range(9)))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert vars(base)["_expand_inputs_for_generation"] is own
    assert calls
