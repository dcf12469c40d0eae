"""Adapters made for an older layout of a model: renamed modules, and experts that were modules."""

from __future__ import annotations

import json
import re
import warnings

import peft
import pytest
import torch
import transformers
from peft import HiraConfig, PeftModel, get_peft_model
from renamed_models import TENSORS, compiled, logits, noisy, renamed
from safetensors.torch import load_file, save_file
from stock_peft import stock_peft
from torch import Tensor, nn

import hira
from hira import HiraError


def llava() -> nn.Module:
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "image_size": 16}
    config = transformers.LlavaConfig(
        text_config={**text, **heads, "num_key_value_heads": 1},
        vision_config={**vision, **heads, "patch_size": 8},
        image_token_index=39,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def old_llava(key: str) -> str:
    key = key.replace("model.model.language_model.", "model.language_model.model.")
    return key.replace("model.model.vision_tower.", "model.vision_tower.").replace(
        "model.lm_head", "model.language_model.lm_head"
    )


def qwen_vl() -> nn.Module:
    torch.manual_seed(0)
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def old_qwen_vl(key: str) -> str:
    return key.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


OLD_NAMES = {"LLaVA": (llava, old_llava), "Qwen2-VL": (qwen_vl, old_qwen_vl)}
TARGETS = {
    "names": {"target_modules": ["q_proj", "v_proj", "qkv"]},
    "a pattern": {"target_modules": r".*language_model.*q_proj"},
    "the head too": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("architecture", OLD_NAMES)
def test_names_of_an_older_transformers(architecture, targets, tmp_path):
    make, old = OLD_NAMES[architecture]
    torch.manual_seed(1)
    model = noisy(get_peft_model(make(), HiraConfig(r=2, init_weights=False, **TARGETS[targets])))
    expected, adapter = logits(model), tmp_path / "adapter"
    model.save_pretrained(adapter)
    renamed(adapter, old)
    for wrap in (lambda base: base, compiled):
        assert torch.equal(logits(PeftModel.from_pretrained(wrap(make()), adapter).eval()), expected)
    make().save_pretrained(tmp_path / "base")
    hira.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    merged = type(make()).from_pretrained(tmp_path / "merged").eval()
    wanted = model.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert hira.inspect_adapter(adapter, base=tmp_path / "base")


def test_names_that_nobody_had_are_refused(tmp_path):
    model = get_peft_model(llava(), HiraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.save_pretrained(tmp_path)
    renamed(tmp_path, lambda key: key.replace("language_model", "talking_model"))
    with pytest.raises(HiraError, match="talking_model"):
        PeftModel.from_pretrained(llava(), tmp_path)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()


def qwen_moe() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    experts = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes, **experts, **heads)).eval()


# the base model, the module with the experts before and now, and the names of gate, up and down
EXPERTS = {
    "Mixtral": (mixtral, "block_sparse_moe.experts", "mlp.experts", ("w1", "w3", "w2")),
    "Qwen2-MoE": (qwen_moe, "mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def old_adapter(architecture: str, folder, ranks: tuple[int, ...] = (2, 2, 2)) -> dict[str, Tensor]:
    """Save an adapter on each expert's modules, as transformers 4 had them; return W' of what is adapted."""
    make, before, now, projections = EXPERTS[architecture]
    base, generator = make(), torch.Generator().manual_seed(3)
    weights = {name: parameter.detach().double() for name, parameter in base.named_parameters()}
    tensors, adapted = {}, {}

    def factors(name: str, W0: Tensor, r: int = 2) -> Tensor:
        """W' with new factors, which are saved."""
        A = torch.randn(r, W0.shape[1], generator=generator)
        B = torch.randn(W0.shape[0], r, generator=generator)
        tensors[f"base_model.model.{name}.hira_A"], tensors[f"base_model.model.{name}.hira_B"] = A, B
        return W0 * (1 + B.double() @ A.double())

    for layer in range(2):
        path = f"model.layers.{layer}"
        query = f"{path}.self_attn.q_proj"
        adapted[f"{query}.weight"] = factors(query, weights[f"{query}.weight"])
        up, down = (weights[f"{path}.{now}.{name}"] for name in ("gate_up_proj", "down_proj"))
        ups, downs = [], []
        for e, r in enumerate(ranks):
            names = [f"{path}.{before}.{e}.{projection}" for projection in projections]
            gate, other = up[e].chunk(2)
            ups.append(torch.cat([factors(names[0], gate, r), factors(names[1], other, r)]))
            downs.append(factors(names[2], down[e], r))
        adapted[f"{path}.{now}.gate_up_proj"], adapted[f"{path}.{now}.down_proj"] = torch.stack(ups), torch.stack(downs)
        if architecture == "Qwen2-MoE":
            for projection in projections:
                name = f"{path}.mlp.shared_expert.{projection}"
                adapted[f"{name}.weight"] = factors(name, weights[f"{name}.weight"])
    folder.mkdir()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj", *projections], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base.save_pretrained(folder.parent / "base")
    return {**weights, **adapted}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_that_were_modules(architecture, tmp_path):
    """Loaded on the parameters that they are now, saved and loaded again, and merged on a disk."""
    make = EXPERTS[architecture][0]
    expected = old_adapter(architecture, tmp_path / "adapter")
    model = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make(), tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(model))
    for merged in (model.merge_and_unload(), again.merge_and_unload()):
        for name, parameter in merged.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    hira.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    on_disk = type(merged).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(on_disk[name], parameter) for name, parameter in merged.named_parameters())


@pytest.mark.parametrize("architecture", EXPERTS)
def test_old_names_of_experts_as_targets(architecture):
    """They mean the parameters, the fused one with both ranks, and the linear layers of these names."""
    make, _, _, projections = EXPERTS[architecture]
    config = HiraConfig(r=2, target_modules=["q_proj", *projections], init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(make(), config)
    adapted = [module for module in model.modules() if isinstance(module, hira.HiraLayer)]
    ranks = {(module.parameter_name, module.r["default"]) for module in adapted if module.parameter_name}
    assert ranks == {("gate_up_proj", 4), ("down_proj", 2)}
    linear = {module.name.rpartition(".")[2] for module in adapted if not module.parameter_name}
    assert linear == ({"q_proj", *projections} if architecture == "Qwen2-MoE" else {"q_proj"})
    before = logits(model)
    expected = logits(model.merge_and_unload())
    torch.testing.assert_close(before, expected)


def test_half_of_a_fused_parameter_is_refused():
    base = mixtral()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(HiraError, match=r"w1.* w3"):
        get_peft_model(base, HiraConfig(r=2, target_modules=["q_proj", "w1", "w2"]))
    assert [name for name, _ in base.named_modules()] == names


def test_dropout_on_experts_is_refused():
    config = HiraConfig(r=2, target_modules=["w1", "w2", "w3"], hira_dropout=0.1)
    before = config.to_dict()
    with pytest.raises(HiraError, match="hira_dropout"):
        get_peft_model(mixtral(), config)
    assert {**config.to_dict(), "base_model_name_or_path": None} == {**before, "base_model_name_or_path": None}


def test_experts_of_different_ranks_are_refused(tmp_path):
    """They have no common rank in one parameter."""
    old_adapter("Mixtral", tmp_path / "adapter", ranks=(2, 1, 2))
    with pytest.raises(HiraError, match=r"gate_up_proj.*ranks"):
        PeftModel.from_pretrained(mixtral(), tmp_path / "adapter")
    with pytest.raises(HiraError, match=r"gate_up_proj.*ranks"):
        hira.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("factor", ["hira_A", "hira_B"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_an_expert_that_lacks_a_factor_is_refused(architecture, factor, tmp_path):
    old_adapter(architecture, tmp_path / "adapter")
    file = tmp_path / "adapter" / TENSORS
    tensors = load_file(file)
    lost = next(key for key in tensors if ".experts.1." in key and key.endswith(factor))
    del tensors[lost]
    save_file(tensors, file)
    base = EXPERTS[architecture][0]()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(HiraError, match=re.escape(lost)):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert [name for name, _ in base.named_modules()] == before


def test_a_router_and_all_linear():
    model = get_peft_model(mixtral(), HiraConfig(r=2, target_modules=["gate", "q_proj"]))
    assert {m.parameter_name for m in model.modules() if isinstance(m, hira.HiraLayer)} == {None, "weight"}
    model = get_peft_model(mixtral(), HiraConfig(r=2, target_modules="all-linear"))
    found = {m.parameter_name for m in model.modules() if isinstance(m, hira.HiraLayer)}
    assert found == {None, "weight", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_an_adapter_that_has_no_experts(architecture, tmp_path):
    """PEFT's own HiRA adapts the linear layers alone that have these names, and what it saved loads."""
    make, _, _, projections = EXPERTS[architecture]
    with stock_peft():
        torch.manual_seed(1)
        config = peft.HiraConfig(r=2, target_modules=["q_proj", *projections], init_weights=False)
        stock = noisy(get_peft_model(make(), config))
        stock.save_pretrained(tmp_path / "stock")
        expected = logits(stock)
    model = PeftModel.from_pretrained(make(), tmp_path / "stock").eval()
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / TENSORS).keys() == load_file(tmp_path / "stock" / TENSORS).keys()
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path / "again").eval()), logits(model))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["w1", "w2", "w3"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\.mlp\.experts\.\d\.w[123]"},
        {"target_modules": ["w1", "w2", "w3"], "exclude_modules": r".*layers\.0.*"},
    ],
    ids=str,
)
def test_experts_of_some_layers(targets):
    model = get_peft_model(mixtral(), HiraConfig(r=2, rank_pattern={"w2": 3}, init_weights=False, **targets))
    found = {(m.name, m.parameter_name, m.r["default"]) for m in model.modules() if isinstance(m, hira.HiraLayer)}
    experts = "model.layers.1.mlp.experts"
    assert found == {(f"{experts}.gate_up_proj", "gate_up_proj", 4), (f"{experts}.down_proj", "down_proj", 3)}


def test_no_warning_of_names_behind_wrappers(recwarn):
    model = nn.ModuleDict({"layers": nn.ModuleList([torch.compile(nn.ModuleDict({"q": nn.Linear(4, 4)}))])})
    get_peft_model(model, HiraConfig(r=2, target_modules=["layers.0.q"]))
    assert not [warning for warning in recwarn if "no module" in str(warning.message)]
