"""What is saved while adapters are merged is W0 beside A and B, so that it loads into a model that is not merged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hira
from hira import HiraConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]

IDS = torch.tensor([[1, 5, 9, 3]])
BOTH = ["embed_tokens", "lm_head"]


def llama(tied: bool = False) -> Any:
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def config(targets: Any, **options: Any) -> peft.HiraConfig:
    return peft.HiraConfig(r=2, init_weights=False, target_modules=targets, **options)


def adapted(targets: Any, tied: bool = False, names: tuple[str, ...] = ("default",), **options: Any) -> Any:
    model: Any = get_peft_model(llama(tied), config(targets, **options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(targets, **options))
    model.base_model.set_adapter(list(names))
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, by the names that they have without adapters."""
    named = model.get_base_model().named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in named if "hira_" not in name}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["embed_tokens", "q_proj"], {}),
        (["lm_head"], {}),
        (BOTH, {}),
        (r".*(embed_tokens|q_proj)", {}),
        (["q_proj", "model.embed_tokens"], {"save_embedding_layers": True}),
        (["embed_tokens"], {"modules_to_save": ["q_proj"]}),
    ],
    ids=["table", "head", "both", "pattern", "asked for", "beside a saved module"],
)
def test_saved_and_loaded(targets, options, tied, tmp_path):
    save = {key: options[key] for key in ("save_embedding_layers",) if key in options}
    model = adapted(targets, tied, **{key: value for key, value in options.items() if key not in save})
    y, base = outputs(model), llama(tied).state_dict()
    model.merge_adapter()
    merged = weights(model)
    model.save_pretrained(tmp_path, **save)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    tables = [name for name in saved if name.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight"))]
    assert tables
    for name in tables:
        assert torch.equal(saved[name], base[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(llama(tied), tmp_path).eval()), y)
    # the model is as merged as before
    assert all(torch.equal(value, merged[name]) for name, value in weights(model).items())
    model.unmerge_adapter()
    assert torch.equal(outputs(model), y)


@pytest.mark.parametrize("merged", [["first"], ["second"], ["first", "second"]], ids=str)
def test_a_state_dict_of_some_merged_adapters(merged):
    model = adapted(BOTH, names=("first", "second"))
    before, y = {key: value.clone() for key, value in model.state_dict().items()}, outputs(model)
    model.merge_adapter(merged)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    for whole in (model, model.base_model, model.get_base_model()):
        assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items() if key in before)
    torch.manual_seed(1)
    other = adapted(BOTH, names=("first", "second"))
    other.load_state_dict(state)
    torch.testing.assert_close(outputs(other), y)


def test_a_state_dict_that_is_loaded_while_merged():
    model = adapted(BOTH)
    state, y = {key: value.clone() for key, value in model.state_dict().items()}, outputs(model)
    model.merge_adapter()
    merged = weights(model)
    model.load_state_dict(state)
    assert all(torch.equal(value, merged[name]) for name, value in weights(model).items())
    model.unmerge_adapter()
    assert torch.equal(outputs(model), y)


def test_another_models_state_dict_that_is_loaded_while_merged():
    model, other = adapted(BOTH), adapted(BOTH)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"replaced.*'default'"):
        model.load_state_dict(other.state_dict())
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, hira.HiraLayer))
    assert torch.equal(outputs(model), outputs(other))


def test_a_checkpoint_of_the_trainer(tmp_path):
    model = adapted(BOTH)
    y = outputs(model)
    model.merge_adapter()
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **options)).save_model(str(tmp_path))
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(llama(), tmp_path).eval()), y)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(bits: int, tmp_path: Path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def quantised() -> Any:
        model = llama()
        linear, kind = model.lm_head, bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
        options = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
        wide = kind(16, 24, bias=False, **options)
        wide.load_state_dict(linear.state_dict())
        model.lm_head = wide.to("cpu")
        return model

    model: Any = get_peft_model(quantised(), config(BOTH)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    merged = [tensor.clone() for tensor in model.base_model.model.lm_head.base_layer.state_dict().values()]
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    after = model.base_model.model.lm_head.base_layer.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(after, merged, strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_offloaded_embeddings(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model: Any = get_peft_model(accelerate.cpu_offload(llama()), config(BOTH)).eval()
    y = outputs(model)
    model.merge_adapter()
    merged = outputs(model)
    model.save_pretrained(tmp_path)
    saved, base = load_file(tmp_path / "adapter_model.safetensors"), llama().state_dict()
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(saved[f"base_model.model.{name}.base_layer.weight"], base[f"{name}.weight"])
    assert torch.equal(outputs(model), merged)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), y)


def test_an_adapter_that_changed_while_merged_is_unmerged_exactly():
    model = adapted(BOTH)
    base = weights(model)
    model.merge_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.add_(1.0)
    model.state_dict()
    model.unmerge_adapter()
    assert all(torch.equal(value, base[name]) for name, value in weights(model).items())


def test_other_threads_compute_with_the_merged_weight_while_a_state_dict_is_made(monkeypatch):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), HiraConfig(r=2, target_modules=["0"], init_weights=False))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    W0 = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    expected, found = model(x), []
    original = nn.Linear._save_to_state_dict

    def saving(self, *args):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(lambda: torch.equal(model(x), expected)).result(timeout=60))
        original(self, *args)

    monkeypatch.setattr(nn.Linear, "_save_to_state_dict", saving)
    state = model.state_dict()
    assert found == [True]
    assert torch.equal(state["base_model.model.0.base_layer.weight"], W0)
    assert torch.equal(model(x), expected)
