"""Models that read a layer's weight in their forward instead of calling the layer, and code that reads it elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from autograd_memory import address, kept_for_backward
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.wavlm.modeling_wavlm import WavLMAttention
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError
from hira.ops import effective_weight

EXACT = {"rtol": 1e-11, "atol": 1e-11}


class Packed(nn.Module):
    """As the vision models that add a bias of their own to the product for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 15)
        self.q_bias = nn.Parameter(torch.randn(15))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.q_bias)


class Joined(nn.Module):
    """Two weights in one product, one of them under a submodule; and a matrix product of a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"qkv": nn.Linear(6, 5)})
        self.other = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ torch.cat([self.inner["qkv"].weight, self.other.weight]).t()
        return torch.cat([y, x @ self.other.weight.T, self.inner["qkv"](x)], -1)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = Conv1D(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.qkv.bias, x[0], self.qkv.weight) + (x[0] @ self.qkv.weight).tanh()


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.to(self.qkv.weight.dtype), self.qkv.weight, self.qkv.bias)


class Head(nn.Module):
    """A table that is looked up, and is the weight of the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Embedding(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.qkv(ids).tanh(), self.qkv.weight) + self.qkv.weight.sum()


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.qkv.weight, dim=-1))


def vectors() -> Tensor:
    return torch.randn(3, 4, 6, dtype=torch.float64)


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    x: Callable[[], Tensor] = vectors
    targets: tuple[str, ...] = ("qkv",)


def wavlm() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = WavLMAttention(embed_dim=6, num_heads=2, num_buckets=8, max_distance=16)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)[0]

    return Model()


def mobilebert() -> nn.Module:
    config = transformers.MobileBertConfig(
        vocab_size=20, hidden_size=12, embedding_size=8, intra_bottleneck_size=6, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=10, true_hidden_size=6, tie_word_embeddings=False,
    )  # fmt: skip
    head = transformers.models.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead(config)
    nn.init.normal_(head.decoder.weight)
    return head


CASES = {
    "packed": Case(Packed),
    "joined": Case(Joined, targets=("qkv", "other")),
    "Conv1D": Case(Transposed),
    "a convolution": Case(Kernel, lambda: torch.randn(2, 3, 5, dtype=torch.float64)),
    "an embedding": Case(Head, lambda: torch.tensor([[3, 0, 8], [1, 3, 5]])),
    "normalised": Case(Normalised),
    "WavLM": Case(wavlm, targets=("q_proj", "k_proj", "v_proj", "out_proj")),
    "MobileBERT": Case(mobilebert, lambda: torch.randn(2, 3, 12, dtype=torch.float64), ("dense", "decoder")),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
quiet = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def adapted(case: Case, names: tuple[str, ...] = ("default",), **options: Any) -> tuple[Any, nn.Module]:
    """The adapted model, and the model as it was."""
    base = case.model().double()
    plain = copy.deepcopy(base)
    config = {"r": 3, "target_modules": list(case.targets), "init_weights": False, **options}
    model = get_peft_model(base, HiraConfig(**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, HiraConfig(**config))
    model.base_model.set_adapter(list(names))
    return model.double().eval(), plain.eval()


def layers(model: nn.Module) -> dict[str, Any]:
    """By their names in the base model."""
    prefix = "base_model.model."
    found = model.named_modules()
    return {name.removeprefix(prefix): layer for name, layer in found if isinstance(layer, hira.HiraLayer)}


def expected(model: nn.Module, plain: nn.Module, x: Tensor, *names: str) -> Tensor:
    weights = {}
    for key, layer in layers(model).items():
        W0 = dict(plain.named_parameters())[f"{key}.weight"].detach()
        weights[f"{key}.weight"] = W0 * (1 + sum(layer.get_delta_weight(name) for name in names or ("default",)))
    return torch.func.functional_call(plain, weights, (x,))


def factors(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "hira_" in name]


def assert_alike(model: nn.Module, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **EXACT)
    dy = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).view(wanted.shape).cos()
    pairs = zip(*(torch.autograd.grad(y, factors(model), dy) for y in (found, wanted)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, **EXACT)
        assert mine.abs().max() > 0


@quiet
@every_case
def test_what_is_read_is_w(case):
    model, plain = adapted(case)
    x = case.x()
    assert_alike(model, model(x), expected(model, plain, x))
    base = model.get_base_model()
    assert_alike(model, base(x), expected(model, plain, x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(model, plain, x), **EXACT)


@quiet
@every_case
def test_merging_changes_nothing(case):
    model, plain = adapted(case, ("a", "b"))
    x = case.x()
    y = model(x)
    torch.testing.assert_close(y, expected(model, plain, x, "a", "b"), **EXACT)
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(x), y, **EXACT)
    model.merge_adapter(["a"])
    torch.testing.assert_close(model(x), y, **EXACT)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x), **EXACT)
    torch.testing.assert_close(model.merge_and_unload()(x), y, **EXACT)


@quiet
@every_case
def test_checkpointing(case):
    model, plain = adapted(case)
    x = case.x()
    assert_alike(model, checkpoint(model, x, use_reentrant=False), expected(model, plain, x))


@quiet
@pytest.mark.parametrize("case", [CASES["packed"], CASES["joined"], CASES["normalised"], CASES["an embedding"]])
def test_compiled(case):
    model, plain = adapted(case)
    x = case.x()
    assert_alike(model, torch.compile(model, backend="aot_eager")(x), expected(model, plain, x))


@quiet
@every_case
def test_outside_of_a_forward_it_is_the_base_layers_parameter(case):
    """As whoever ties, resizes, initialises or saves weights needs it."""
    model, _ = adapted(case)
    for layer in layers(model).values():
        assert layer.weight is layer.get_base_layer().weight
    model(case.x())
    for layer in layers(model).values():
        assert isinstance(layer.weight, nn.Parameter)


def test_nothing_weight_sized_is_kept_of_a_product_with_it():
    base = Packed()
    base.qkv, base.q_bias = nn.Linear(64, 48), nn.Parameter(torch.randn(48), requires_grad=False)
    model, _ = adapted(Case(lambda: base))
    W0 = layers(model)["qkv"].get_base_layer().weight
    x = torch.randn(5, 64, dtype=torch.float64)
    kept = kept_for_backward(lambda: model(x))
    assert kept.pop(address(W0)) == W0.nbytes
    assert max(kept.values()) < W0.nbytes


@pytest.mark.parametrize(
    "read", [lambda weight: weight.dtype, lambda weight: (weight.device, weight.shape, len(weight))]
)
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_what_is_not_data_costs_nothing(kind, read, monkeypatch):
    """T5 asks for the dtype of `wo.weight`, vision models for that of their first convolution."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = {"linear": nn.Linear(6, 5), "convolution": nn.Conv1d(3, 4, 2), "embedding": nn.Embedding(9, 6)}[
                kind
            ]

        def forward(self, x: Tensor) -> Any:
            assert isinstance(self.qkv.weight, Tensor)
            return read(self.qkv.weight)

    model, plain = adapted(Case(Asking))
    monkeypatch.setattr(effective_weight, "form", lambda *_, **__: pytest.fail("W' was formed"))
    assert model(vectors()) == plain(vectors())


def test_an_autograd_function_of_it():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return 2 * weight

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, Double.apply(self.qkv.weight))

    model, plain = adapted(Case(Model))
    x = vectors()
    assert_alike(model, model(x), expected(model, plain, x))


def test_rows_of_a_mixed_batch_cannot_differ():
    model, plain = adapted(CASES["packed"], ("a", "b"))
    model.set_adapter("a")
    x = vectors()
    with torch.no_grad():
        wanted = expected(model, plain, x, "a")
        torch.testing.assert_close(model(x, adapter_names=["a"] * 3), wanted, **EXACT)
        for names in (["a", "b", "a"], ["__base__"] * 3):
            with pytest.raises(HiraError, match="qkv"):
                model(x, adapter_names=names)
        torch.testing.assert_close(model(x), wanted, **EXACT)


def test_a_parameter_that_is_adapted_on_its_own():
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(5, 6))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.fc = Router(), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.router.kernel) + F.linear(x, self.fc.weight)

    base = Model().double()
    config = HiraConfig(r=2, target_parameters=["router.kernel", "fc.weight"], target_modules=[], init_weights=False)
    model, x = get_peft_model(base, config).double(), vectors()
    y = model(x)
    y.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in factors(model))
    wrappers = [module for module in model.modules() if isinstance(module, hira.HiraLayer)]
    W = sum(w.storage.stored * (1 + w.get_delta_weight("default")) for w in wrappers)
    torch.testing.assert_close(y, F.linear(x, W), **EXACT)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **EXACT)
    assert base.router.kernel is wrappers[0].get_base_layer().kernel


def whisper() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    config = transformers.WhisperConfig(
        vocab_size=20, num_mel_bins=4, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=6, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 4, 12).double(), "decoder_input_ids": torch.tensor([[1, 3], [1, 5]])}
    return transformers.WhisperForConditionalGeneration(config), inputs, ["embed_positions"]


def opt() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=12,
    )  # fmt: skip
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    return transformers.OPTForCausalLM(config), {"input_ids": ids}, ["embed_positions", "embed_tokens"]


def bart() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_ffn_dim=8,
        decoder_attention_heads=2, encoder_ffn_dim=8, max_position_embeddings=12,
    )  # fmt: skip
    return (
        transformers.BartForConditionalGeneration(config),
        {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])},
        ["embed_positions", "fc1"],
    )


def t5() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    return (
        transformers.T5ForConditionalGeneration(config),
        {"input_ids": ids, "decoder_input_ids": ids},
        ["wi", "wo", "lm_head"],
    )


@pytest.mark.parametrize("make", [whisper, opt, bart, t5])
def test_whole_models(make):
    """All adapted layers get gradients, and merging changes nothing."""
    base, inputs, targets = make()
    model = get_peft_model(base, HiraConfig(r=2, target_modules=targets, init_weights=False)).double().eval()
    y = model(**inputs).logits
    y.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in factors(model))
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs).logits, y, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, y, **EXACT)
