"""What is measured: single layers of several kinds, a small Llama in training and in decoding, mixed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from benchmarks.comparison.methods import (
    DORA,
    FULL,
    HIRA,
    HIRA_INT8,
    HIRA_KEPT,
    LORA,
    METHODS,
    PEFT_HIRA,
    Method,
    start,
)
from torch import Tensor, nn

from hira import inference_cache

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Options:
    """What the cases share.

    Args:
        device: "cpu" or "cuda".
        dtype: the dtype of the base model; adapters are in float32, as PEFT makes them.
        rank: r of every adapter.
        quick: smaller cases, for a look in under two minutes.
        only: the names, or parts of names, of the cases to run; all by default.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rank: int = 32
    quick: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        name: as it stands in tables.
        mode: "train" times forward and backward, "infer" a forward without gradients.
        base: makes the bare model, the same at each call.
        targets: the modules to adapt.
        methods: the methods that can do it.
        inputs: what is timed.
        check_inputs: what is checked against the reference; smaller, where the reference would take long.
        call: runs a model on inputs, and returns its output or loss.
        mixed: how many adapters there are, one for each row of a batch; 0 for one adapter that serves all rows.
        repeats: how often each method is timed.
        micro_batches: how many forward and backward passes there are in one step of the optimizer.
        per: what one timed call amounts to, in the units of the table: a decoding call gives several tokens.
        memory: whether the peak of memory is measured as well.
        reference_base: makes the bare model for the reference, whose targets get the effective weights; `base` by
            default.
    """

    name: str
    mode: Literal["train", "infer"]
    base: Callable[[], nn.Module]
    targets: list[str]
    inputs: Tensor
    methods: tuple[Method, ...] = METHODS
    check_inputs: Tensor | None = None
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    timed_call: Callable[[nn.Module, Tensor], Any] | None = None
    mixed: int = 0
    micro_batches: int = 1
    repeats: int = 15
    per: int = 1
    memory: bool = False
    reference_base: Callable[[], nn.Module] | None = None
    options: Options = field(default_factory=Options)


def cases(options: Options) -> list[Case]:
    """All cases for some options, in the order in which they run; a 4-bit one only where bitsandbytes is installed."""
    wanted = options.only
    return [case for case in _all(options) if not wanted or any(part in case.name for part in wanted)]


def _all(options: Options) -> Iterator[Case]:
    grid = [(512, 256), (1024, 32)] if options.quick else [(2048, 32), (2048, 1024), (4096, 512), (2048, 4096)]
    if options.device == "cuda" and not options.quick:
        grid = [(4096, 32), (4096, 1024), (4096, 4096), (8192, 4096)]
    for size, tokens in grid:
        yield _linear(size, tokens, options)
    yield _llama_step(options)
    yield _llama_accumulating(options)
    if find_spec("bitsandbytes") is not None:
        yield _llama_4bit_step(options)
    yield _embedding(options)
    yield _convolution(options)
    yield _decoding(options)
    for adapters in (1, 4, 16):
        yield _mixed_batch(adapters, options)


def _bare(build: Callable[[], nn.Module], options: Options) -> Callable[[], nn.Module]:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return build().to(options.device, options.dtype)

    return base


def _random(options: Options, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator).to(options.device, options.dtype)


def _ids(options: Options, limit: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(limit, shape, generator=generator).to(options.device)


def _linear(size: int, tokens: int, options: Options) -> Case:
    return Case(
        name=f"linear {size} x {size}, {tokens} tokens",
        mode="train",
        base=_bare(lambda: nn.Sequential(nn.Linear(size, size, bias=False)), options),
        targets=["0"],
        inputs=_random(options, tokens, size),
        repeats=40 if size * tokens < 1 << 18 else 15,
        options=options,
    )


def _embedding(options: Options) -> Case:
    rows, width, ids = (8192, 256, 512) if options.quick else (50272, 768, 2048)
    return Case(
        name=f"embedding {rows} x {width}, {ids} ids",
        mode="train",
        base=_bare(lambda: nn.Sequential(nn.Embedding(rows, width)), options),
        targets=["0"],
        methods=(LORA, HIRA, PEFT_HIRA, FULL),
        inputs=_ids(options, rows, ids),
        options=options,
    )


def _convolution(options: Options) -> Case:
    channels, side = (32, 16) if options.quick else (128, 32)
    return Case(
        name=f"convolution {channels} channels, 3 x 3, 8 x {side} x {side}",
        mode="train",
        base=_bare(lambda: nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), options),
        targets=["0"],
        methods=(LORA, HIRA, PEFT_HIRA, FULL),
        inputs=_random(options, 8, channels, side, side),
        options=options,
    )


def _llama(options: Options) -> tuple[str, Callable[[], nn.Module]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    if options.quick:
        layers, width = 2, 256
    elif options.device == "cuda":
        layers, width = 16, 2048
    else:
        layers, width = 8, 1024
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=8192 if options.quick else 32000,
    )
    return f"Llama, {layers} layers, width {width}", _bare(lambda: LlamaForCausalLM(config), options)


def _llama_step(options: Options) -> Case:
    name, base = _llama(options)
    tokens = 128 if options.quick else 512
    return Case(
        name=f"{name}, 2 x {tokens} tokens",
        mode="train",
        base=base,
        targets=LLAMA_TARGETS,
        inputs=_ids(options, 8192, 2, tokens),
        check_inputs=_ids(options, 8192, 1, 12),
        call=lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
        repeats=10 if options.quick or options.device == "cuda" else 3,
        memory=True,
        options=options,
    )


def _llama_accumulating(options: Options) -> Case:
    """Eight micro-batches for one step of the optimizer, their activations recomputed."""
    case = _llama_step(options)

    def base() -> nn.Module:
        model: Any = case.base()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return cast(nn.Module, model)

    return replace(
        case,
        name=f"{case.name.replace(', 2 x', ', 8 x 2 x')}, recomputed",
        base=base,
        reference_base=case.base,  # whose weights are exchanged for a call, and would not be for a recomputation
        methods=(LORA, HIRA, HIRA_KEPT),
        micro_batches=8,
        repeats=1,
        memory=False,
    )


def _llama_4bit_step(options: Options) -> Case:
    """The step of the Llama, its linear layers packed to 4 bits (nf4, double quantisation)."""
    import bitsandbytes as bnb

    case = _llama_step(options)

    def packed() -> nn.Module:
        model: Any = case.base()
        linears = [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in case.targets]
        for name, linear in linears:
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=options.dtype
            )
            layer.load_state_dict(linear.state_dict())
            model.set_submodule(name, layer.to(options.device))
        model.is_loaded_in_4bit = True  # PEFT's own tuners ask for it
        return cast(nn.Module, model)

    return replace(
        case,
        name=case.name.replace(", 2 x", ", 4 bits, 2 x"),
        base=packed,
        reference_base=case.base,
        methods=(LORA, HIRA, HIRA_INT8, PEFT_HIRA),
    )


def _decoding(options: Options) -> Case:
    name, base = _llama(options)
    tokens = 8 if options.quick else 32

    def generate(model: Any, ids: Tensor) -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )

    def last_logits(model: Any, ids: Tensor) -> Tensor:
        """Those of the last token, decoded behind the others as in generation, twice."""
        for _ in range(2):
            past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]
        return logits

    return Case(
        name=f"{name}, greedy decoding, one token",
        mode="infer",
        base=base,
        targets=LLAMA_TARGETS,
        methods=(LORA, HIRA, PEFT_HIRA, DORA, FULL),
        inputs=_ids(options, 8192, 1, 16),
        call=last_logits,
        timed_call=generate,
        repeats=5,
        per=tokens,
        options=options,
    )


def _mixed_batch(adapters: int, options: Options) -> Case:
    size, tokens = (512, 8) if options.quick else (2048, 32)
    names = [adapter_name(i) for i in range(adapters)]

    def in_generation(model: nn.Module, x: Tensor) -> None:
        """One call after another, in which hira keeps weights as it does in a model's `generate`."""
        with inference_cache.keep():
            for _ in range(tokens):
                model(x, adapter_names=names)

    return Case(
        name=f"linear {size} x {size}, mixed batch of {adapters} adapters, one of {tokens} tokens",
        mode="infer",
        base=_bare(lambda: nn.Sequential(nn.Linear(size, size, bias=False)), options),
        targets=["0"],
        methods=(LORA, HIRA, PEFT_HIRA),
        inputs=_random(options, adapters, size),
        call=lambda model, x: model(x, adapter_names=names),
        timed_call=in_generation,
        mixed=adapters,
        repeats=10,
        per=tokens,
        options=options,
    )


def adapter_name(index: int) -> str:
    """The names of a model's adapters, in the order in which they are added."""
    return f"adapter{index}" if index else "default"


def adapted(case: Case, method: Method) -> nn.Module:
    """The case's model under a method, with adapters that do something."""
    model = case.base().requires_grad_(False)
    for i in range(max(case.mixed, 1)):
        model = method.adapt(model, case.targets, case.options.rank, adapter_name(i))
    start(model)
    return model.train(case.mode == "train")


def step(case: Case, model: nn.Module, inputs: Tensor) -> None:
    """One run of the case."""
    if case.mode == "infer":
        with torch.no_grad():
            (case.timed_call or case.call)(model, inputs)
    else:
        for _ in range(case.micro_batches):
            y = case.call(model, inputs)
            torch.autograd.backward(y, torch.ones_like(y))
