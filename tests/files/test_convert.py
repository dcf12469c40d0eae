"""Folders converted to folders: what stock PEFT makes of them, what is written, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import error
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stock_peft import stock_peft
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hira import HiraError, convert_adapter, verify_folder
from hira.files.io.output_folder import Output

P = "base_model.model."
IDS = torch.tensor([[1, 5, 9, 3, 0, 2], [1, 6, 7, 8, 4, 10]])
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


class Attends(nn.Module):
    """Attention, a convolution and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv, self.head = nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 2)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


# a model and the options of an adapter on it
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    "tied output": (llama, {"target_modules": ["k_proj", "lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),  # c_proj is square
    "conv1d, said": (gpt2, {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True}),
    "kinds": (Attends, {"target_modules": ["embed", "conv"], "modules_to_save": ["head"]}),
    "attention": (Attends, {"target_modules": ["attention", "head"], "exclude_modules": ["attention.out_proj"]}),
    "ranks": (Attends, {"target_modules": ["embed", "conv"], "rank_pattern": {"embed": 2}}),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(tmp_path: Path, case: str, **options: Any) -> tuple[nn.Module, Any]:
    """A model and a HiRA adapter on it, both in folders; the base model and the adapted one."""
    torch.manual_seed(0)
    model_class, config = CASES[case]
    base = model_class().eval()
    folder = tmp_path / "base"
    folder.mkdir()
    if isinstance(base, Attends):
        save_file(base.state_dict(), folder / "model.safetensors")
    else:
        base.save_pretrained(folder)
    config = peft.HiraConfig(**{"r": 3, "init_weights": False, **config, **options})
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():  # small enough for float32 to compare outputs
        if "hira_" in name:
            parameter.data.mul_(0.5)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return base, model


def logits(model: Any) -> Tensor:
    y = model(input_ids=IDS)
    return (y if isinstance(y, Tensor) else y.logits).detach()


def loaded(base: nn.Module, folder: Path, **options: Any) -> Any:
    """The adapter in stock PEFT, which must find all its tensors and nothing left over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        warnings.filterwarnings("error", "Unexpected keyword arguments")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder, **options).eval()


def weight(state: dict[str, Tensor], module: str) -> Tensor:
    plain = module.replace(".base_layer", "")
    return state.get(f"{plain}.weight", state.get(f"{plain}.in_proj_weight")).double()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every_case
@pytest.mark.parametrize("rank", [1, 64])
def test_a_lora_in_stock_peft_is_off_by_what_was_reported(case, rank, tmp_path):
    base, model = made(tmp_path, case)
    y, before = logits(model), base.state_dict()
    result = convert_adapter(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=rank, base=tmp_path / "base")
    assert (result.peft_type, result.rank, result.lora.rank) == ("LORA", rank, rank)
    exact = model.merge_and_unload().state_dict()
    with stock_peft():
        lora = loaded(base, tmp_path / "lora")
        if rank == 64:
            assert error(logits(lora), y) < 1e-5
        with lora.disable_adapter():
            assert error(logits(lora), y) > 0.01
        found = lora.merge_and_unload().state_dict()
    lost = total = 0.0
    assert len(result.lora.layers) == result.modules > 0
    for layer in result.lora.layers:
        W0 = weight(before, layer.name)
        update, approximation = weight(exact, layer.name) - W0, weight(found, layer.name) - W0
        difference = float((approximation - update).square().sum())
        assert layer.relative_error == pytest.approx((difference / float(update.square().sum())) ** 0.5, abs=2e-5)
        lost, total = lost + difference, total + float(update.square().sum())
    assert result.lora.relative_error == pytest.approx((lost / total) ** 0.5, abs=2e-5)
    assert (result.lora.relative_error > 0.1) == (rank == 1)
    json.dumps(result.to_dict(), allow_nan=False)
    assert verify_folder(tmp_path / "lora") == []


def test_attention_without_its_output_leaves_no_lora_unset(tmp_path):
    """PEFT's LoRA adapts both weights; under low_cpu_mem_usage one that is not in the file would have no values."""
    base, model = made(tmp_path, "attention")
    convert_adapter(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=64, base=tmp_path / "base")
    with stock_peft():
        lora = loaded(base, tmp_path / "lora", low_cpu_mem_usage=True)
        assert not any(parameter.is_meta for parameter in lora.parameters())
        assert error(logits(lora), logits(model)) < 1e-5


def test_attention_with_its_output_is_refused(tmp_path):
    """Where this fails because PEFT adds the update once, such adapters can be converted to LoRA."""
    made(tmp_path, "attention", exclude_modules=None)
    for options in ({"fold": True}, {"to": "lora", "rank": 4, "base": tmp_path / "base"}):
        with pytest.raises(HiraError, match=r"'attention\.base_layer\.out_proj' is inside .*`hira merge` instead"):
            convert_adapter(tmp_path / "adapter", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with stock_peft():
        base = Attends()
        before = base.attention.out_proj.weight.detach().clone()
        model = get_peft_model(base, peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False))
        update = base.attention.base_layer.out_proj.get_delta_weight("default").detach()
        merged = model.merge_and_unload().attention.out_proj.weight
        assert error(merged - before, 2 * update) < 1e-5


@every_case
def test_a_folded_adapter_computes_the_same_in_stock_peft(case, tmp_path):
    base, model = made(tmp_path, case, weight_gradient="int8")
    result = convert_adapter(tmp_path / "adapter", tmp_path / "folded", fold=True)
    assert (result.peft_type, result.rank, result.lora) == ("HIRA", 3, None)
    config = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    assert "weight_gradient" not in config
    assert verify_folder(tmp_path / "folded") == []
    with stock_peft():
        if case == "attention":  # which only the model tells
            with pytest.raises(ValueError, match=r"(?s)MultiheadAttention.* is not supported"):
                loaded(base, tmp_path / "folded")
        else:
            assert error(logits(loaded(base, tmp_path / "folded")), logits(model)) < 1e-5


def test_grouped_convolutions_are_refused_by_stock_peft_itself(tmp_path):
    """Only the model tells that they are: a kernel (6, 4, 3) may be of 4 inputs or of 8 in two groups."""
    base = nn.Sequential(nn.Conv1d(8, 6, 3, groups=2))
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    model = get_peft_model(copy.deepcopy(base), peft.HiraConfig(r=2, target_modules=["0"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=2, base=tmp_path / "base")
    convert_adapter(tmp_path / "adapter", tmp_path / "folded", fold=True)
    with stock_peft():
        with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.0\.lora_B"):
            loaded(base, tmp_path / "lora")
        with pytest.raises(NotImplementedError, match="groups > 1"):
            loaded(base, tmp_path / "folded")


def test_saved_tensors_of_any_shape_come_along(tmp_path):
    made(tmp_path, "kinds")
    extra = {
        f"{P}head.count": torch.tensor(7),
        f"{P}head.empty": torch.zeros(0, 3),
        f"{P}head.flag": torch.tensor([True]),
    }
    edited(tmp_path, "adapter/adapter_model.safetensors", **extra)
    convert_adapter(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=2, base=tmp_path / "base")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in extra.items())


ORIGINAL = {
    "peft_type": "LORA",
    "r_ab": 3,
    "lora_alpha": 16,
    "scale_ab": 2.0,
    "lora_dropout": 0.3,
    "bias": "none",
    "fan_in_fan_out": False,
    "rand_R": False,
    "task_type": "CAUSAL_LM",
    "target_modules": [" q_proj", "own_proj"],  # the ends of names, which PEFT would not match
    "base_model_name_or_path": "someone/llama",
}


def original(tmp_path: Path, base: nn.Module, **config: Any) -> Path:
    """An adapter of the paper's repository, as a pickle."""
    folder = tmp_path / "original"
    folder.mkdir()
    tensors = {}
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            tensors[f"{P}{name}.lora_A"] = torch.randn(3, module.in_features) / 4
            tensors[f"{P}{name}.lora_B"] = torch.randn(module.out_features, 3)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(ORIGINAL | config))
    return folder


def test_an_adapter_of_the_papers_repository(tmp_path):
    base, _ = made(tmp_path, "llama")
    folder = original(tmp_path, base)
    exact = copy.deepcopy(base)
    tensors = torch.load(folder / "adapter_model.bin")
    for name, module in exact.named_modules():
        if f"{P}{name}.lora_A" in tensors:
            A, B = tensors[f"{P}{name}.lora_A"], tensors[f"{P}{name}.lora_B"]
            module.weight.data *= 1 + B @ A
    with pytest.raises(HiraError, match=r"peft_type 'LORA'.*--from original"):
        convert_adapter(folder, tmp_path / "out", fold=True)
    with pytest.raises(HiraError, match=r"pass --allow-pickle \(allow_pickle=True\)"):
        convert_adapter(folder, tmp_path / "out", source="original")
    result = convert_adapter(folder, tmp_path / "out", source="original", allow_pickle=True)
    assert (result.path, result.peft_type, result.rank, result.modules) == (tmp_path / "out", "HIRA", 3, 4)
    assert error(logits(loaded(base, tmp_path / "out")), logits(exact)) < 1e-5
    with stock_peft():
        model = loaded(base, tmp_path / "out")
        assert type(model.base_model).__module__ == "peft.tuners.hira.model"
        assert error(logits(model), logits(exact)) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/llama" in card.splitlines()
    assert "an adapter of the HiRA paper's repository" in card


def test_two_conversions_at_once_are_the_two_in_turn(tmp_path):
    base, _ = made(tmp_path, "llama")
    folder = original(tmp_path, base)
    options = {"to": "lora", "rank": 2, "base": tmp_path / "base"}
    convert_adapter(folder, tmp_path / "hira", source="original", allow_pickle=True, fold=True)
    second = convert_adapter(tmp_path / "hira", tmp_path / "second", **options)
    both = convert_adapter(folder, tmp_path / "both", source="original", allow_pickle=True, **options)
    assert both.lora.relative_error == pytest.approx(second.lora.relative_error, rel=1e-12)
    assert set(both.lora.layers) == set(second.lora.layers)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_is_written(tmp_path):
    made(tmp_path, "kinds")
    result = convert_adapter(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=2, base=tmp_path / "base")
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "hira-manifest.json"}
    assert content(tmp_path / "lora").keys() == names
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    card = (tmp_path / "lora" / "README.md").read_text()
    assert result.lora.statement in card
    assert f"{result.lora.relative_error:.6g}" in card
    assert '"adapter"' in card
    assert "base_model:" not in card  # a local path means nothing elsewhere


def test_a_name_in_the_card_is_no_markup(tmp_path):
    made(tmp_path, "ranks")
    folder = (tmp_path / "adapter").rename(tmp_path / "a`<b>\n# c")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": 'a"\nb: c/d'}))
    convert_adapter(folder, tmp_path / "out", fold=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '`"a\\u0060<b>\\n# c"`' in card
    assert "base_model" not in card


def edited(tmp_path: Path, name: str, **tensors: Tensor | None) -> None:
    """Change or take away tensors of a file."""
    path = tmp_path / name
    content = {**load_file(path), **{key.replace("__", "."): value for key, value in tensors.items()}}
    save_file({key: value for key, value in content.items() if value is not None}, path)


def nan_in_the_adapter(tmp_path: Path) -> None:
    edited(tmp_path, "adapter/adapter_model.safetensors", **{f"{P}conv.hira_B": torch.full((6, 3, 1), torch.nan)})


def nan_in_what_is_saved(tmp_path: Path) -> None:
    edited(tmp_path, "adapter/adapter_model.safetensors", **{f"{P}head.bias": torch.full((2,), torch.nan)})


def nan_in_the_base(tmp_path: Path) -> None:
    edited(tmp_path, "base/model.safetensors", embed__weight=torch.full((11, 8), torch.nan))


def another_shape(tmp_path: Path) -> None:
    edited(tmp_path, "base/model.safetensors", conv__weight=torch.ones(6, 8, 5))


def another_model(tmp_path: Path) -> None:
    edited(tmp_path, "base/model.safetensors", conv__weight=None, conv__bias=None)


def in_four_bits(tmp_path: Path) -> None:
    edited(tmp_path, "base/model.safetensors", conv__weight=torch.ones(72, 1, dtype=torch.uint8))


def in_float8(tmp_path: Path) -> None:
    edited(tmp_path, "base/model.safetensors", conv__weight=torch.ones(6, 8, 3).to(torch.float8_e4m3fn))


def packed(tmp_path: Path) -> None:
    edited(tmp_path, "base/model.safetensors", conv__weight=None, conv__qweight=torch.ones(3, 3, dtype=torch.int32))


def with_experts(tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["experts.up"]}))


REFUSALS = {
    nan_in_the_adapter: r"conv\.hira_B' of the adapter .* has a NaN",
    nan_in_what_is_saved: r"head\.bias' of the adapter .* has a NaN",
    nan_in_the_base: "weight of module 'embed' holds NaN",
    another_shape: r"factors of conv in .*do not fit the parameters of .*conv.weight \(6, 8, 5\).* of another model",
    another_model: "has no parameters for conv of the adapter .* is of another model",
    in_four_bits: "'conv' as real numbers, but conv.weight of torch.uint8: it is quantised",
    in_float8: "'conv' as real numbers, but conv.weight of torch.float8_e4m3fn: it is quantised",
    packed: "'conv' as real numbers, but conv.qweight: it is quantised",
    with_experts: "has target_parameters .*only loaded, or merged with `hira merge`",
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_a_refusal_leaves_everything_as_it_was(change, existing, tmp_path):
    made(tmp_path, "kinds")
    change(tmp_path)
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
    before = content(tmp_path)
    with pytest.raises(HiraError, match=REFUSALS[change]):
        convert_adapter(
            tmp_path / "adapter", tmp_path / "out", to="lora", rank=2, base=tmp_path / "base", overwrite=existing
        )
    assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"} | ({"out"} if existing else set())


def test_an_output_that_another_process_writes_is_refused(tmp_path):
    made(tmp_path, "kinds")
    with Output(tmp_path / "out") as out:
        with pytest.raises(HiraError, match=r"another process is writing to .*out;"):
            convert_adapter(tmp_path / "adapter", tmp_path / "base" / ".." / "out", fold=True, overwrite=True)
        out.write("first", b"kept")
    assert verify_folder(tmp_path / "out") == [] and (tmp_path / "out" / "first").read_bytes() == b"kept"


def test_outputs_that_are_refused(tmp_path):
    made(tmp_path, "ranks")
    adapter, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "out"
    before = content(tmp_path)
    for target in (adapter, tmp_path, adapter / "within"):
        with pytest.raises(HiraError, match="which is read; name another folder"):
            convert_adapter(adapter, target, fold=True, overwrite=True)
    with pytest.raises(HiraError, match="which is read; name another folder"):
        convert_adapter(adapter, base, to="lora", rank=1, base=base, overwrite=True)
    assert content(tmp_path) == before
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(HiraError, match="is not empty; name another folder, or pass --overwrite"):
        convert_adapter(adapter, out, fold=True)
    with pytest.raises(HiraError, match="is not empty"):  # before anything is read
        convert_adapter(adapter, out, to="lora", rank=1, base=tmp_path / "nowhere")
    assert content(out) == {"mine": b"precious"}
    convert_adapter(adapter, out, fold=True, overwrite=True)
    assert "mine" not in content(out)
    assert verify_folder(out) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to convert"),
        ({"allow_pickle": True}, "nothing to convert"),
        ({"source": "peft"}, "not from 'peft'"),
        ({"to": "dora"}, "not to 'dora'"),
        ({"to": "lora", "rank": 2}, "--rank and --base"),
        ({"to": "lora", "base": "base"}, "--rank and --base"),
        ({"fold": True, "rank": 2}, "for a LoRA only"),
        ({"source": "original", "base": "base"}, "for a LoRA only"),
        ({"to": "lora", "rank": 2, "base": "base", "fold": True}, "not both"),
    ],
)
def test_options_that_contradict_each_other(options, message, tmp_path):
    with pytest.raises(HiraError, match=message):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_is_a_positive_integer(rank, tmp_path):
    made(tmp_path, "ranks")
    with pytest.raises(HiraError, match=f"positive integer, but is {rank}"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", to="lora", rank=rank, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
