"""HiraConfig, the configuration of HiRA adapters."""

from __future__ import annotations

import copy
import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from hira.errors import HiraError

InitWeights = bool | Literal["gaussian"] | None
Config = TypeVar("Config", bound=PeftConfig)

_INSTEAD = {
    "lora_alpha": "it is hira_alpha, with which HiRA trains at LoRA's learning rate",
    "alpha": "it is hira_alpha, with which HiRA trains at LoRA's learning rate",
    "lora_r": "the rank is r",
    "rank": "the rank is r",
    "r_ab": "the rank is r; `hira convert --from original` reads adapters of the paper's repository",
    "lora_dropout": "it is hira_dropout",
    "dropout": "it is hira_dropout",
    "init_lora_weights": "it is init_weights: True, 'gaussian' or False",
    "bias": "HiRA trains no biases",
    "lora_bias": "HiRA trains no biases",
    "use_dora": "HiRA scales each entry of the weight already, and is not combined with DoRA",
}


# fields that PEFT's HiraConfig lacks, and what they are where they are not saved
_NOT_IN_PEFT = {
    "weight_gradient": "exact",
    "target_parameters": None,
    "hira_alpha": None,
    "alpha_pattern": None,
    "use_rslora": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": None,
    "layer_replication": None,
}


class UnknownFieldError(HiraError, TypeError):
    """A HiraError for a field that HiraConfig does not have; a TypeError too, from which PEFT knows to drop it."""


def _explaining_unknown_fields(config_class: type[Config]) -> type[Config]:
    """Make a configuration class explain what to use in the place of a field that it does not have."""
    init = vars(config_class)["__init__"]

    @functools.wraps(init)
    def explaining(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {item.name for item in fields(self) if item.init}
        for name in kwargs.keys() - known:
            raise UnknownFieldError(f"HiraConfig got an unexpected keyword argument {name!r}: {_instead(name, known)}.")
        init(self, *args, **kwargs)

    setattr(config_class, "__init__", explaining)  # noqa: B010 (mypy lets no `__init__` be assigned)
    return config_class


def _instead(name: str, known: set[str]) -> str:
    """What to use in the place of an unknown field."""
    if name in _INSTEAD:
        return _INSTEAD[name]
    if name in {item.name for item in fields(LoraConfig)}:
        return "this field of LoRA has no counterpart in HiRA; leave it out"
    if close := difflib.get_close_matches(name, known, n=1):
        return f"perhaps {close[0]!r} is meant"
    return f"the fields are {', '.join(sorted(known))}"


@_explaining_unknown_fields
@dataclass
class HiraConfig(PeftConfig):
    """Configures HiRA adapters, ``W' = W0 * (1 + BA)``; the fields and their JSON are those of PEFT's HiraConfig.

    Args:
        r: the rank of BA, for every adapted module that `rank_pattern` does not name.
        hira_alpha: LoRA's alpha, for HiRA at LoRA's learning rate: ``W' = W0 * (1 + s B A)``, with s the power of two
            that is nearest to hira_alpha / (r rms(W0)) of the layer, so that a step of Adam changes W' as much as with
            a LoRA of this alpha. A checkpoint has s B for B, which every reader understands. None, the paper's HiRA,
            is s = 1, and takes a rate 5 to 50 times LoRA's. Not a field of PEFT's: it is saved where it is set.
        alpha_pattern: alphas in the place of `hira_alpha`, for modules named as in `rank_pattern`.
        use_rslora: for a rank-stabilised scale, s near hira_alpha / (sqrt(r) rms(W0)).
        target_modules: the modules to adapt: names or ends of names in a list, a regular expression in a string, or
            "all-linear" for every linear and `Conv1D` layer but the output layer. By default PEFT's choice for the
            model's architecture.
        exclude_modules: modules to leave out, in the same two forms.
        hira_dropout: the probability, in [0, 1), with which the update's input is dropped in training. For embeddings
            it is that of dropping the update of a whole token.
        fan_in_fan_out: whether the weights are stored as (in, out). Found out for `nn.Linear` and `Conv1D`.
        modules_to_save: further modules to train in full and save, such as a classifier.
        init_weights: True, or None, starts from W0 with B zero and A as `nn.Linear` starts its weight; "gaussian"
            draws A from a normal distribution of standard deviation 1 / r instead. Embeddings have A zero and B normal
            in both. False draws both at random, so that the adapter does something before training; it is for tests.
        layers_to_transform: the indices of the layers to adapt, all by default.
        layers_pattern: the name of the list of layers that the indices are into.
        rank_pattern: ranks for modules named by the ends of their names or by regular expressions.
        target_parameters: parameters to adapt, by the ends of their names, such as "experts.gate_up_proj": matrices,
            and the weights of experts stacked in three dimensions. As in PEFT's LoRA, `exclude_modules` and
            `layers_to_transform` do not apply to them, and the architecture's default modules are adapted as well
            unless `target_modules` is an empty list. Not a field of PEFT's: it is saved where it is set.
        weight_gradient: how linear layers compute the gradient of their weight, which serves those of A and B alone:
            "exact", or "int8" for a product of integers that is faster for large sizes, keeps less memory, and adds
            noise of a few per cent to the gradients of A and B (docs/architecture.md). A layer with several adapters
            rounds if all of them say so. Not a field of PEFT's: it is saved where it is not "exact", and what an
            adapter computes does not depend on it.
        trainable_token_indices: tokens whose rows of the embedding train in full and are saved: a list of ids, or a
            dict of such lists by the names of embeddings. Layers with tied weights follow. Such an embedding is no
            target of HiRA as well.
        ensure_weight_tying: where a target, a module to save or the embedding of the trainable tokens shares its weight
            with others, as input and output embeddings do, give all of them one and the same adapter.
        layer_replication: ranges [start, end) of the model's layers, which are stacked to a deeper model whose layers
            share the base weights, each with an adapter of its own: [[0, 4], [2, 5]] gives 0 1 2 3 2 3 4. The adapters
            of a model must have the same. It, `alpha_pattern`, `use_rslora`, `trainable_token_indices` and
            `ensure_weight_tying` mean what they mean in LoRA. None is a field of PEFT's HiraConfig: each is saved where
            it is set.

    Raises:
        HiraError: a field does not exist (a TypeError as well), r or a rank of `rank_pattern` is not a positive
            integer, the dropout is not in [0, 1), or not 0 with `target_parameters`, these are not a list of names,
            `hira_alpha` is not a positive number, `alpha_pattern` or `use_rslora` goes without it, ids of tokens or
            ranges of layers are none, `init_weights` or `weight_gradient` is unknown, or `layers_to_transform` or
            `layers_pattern` goes with a regular expression.

    Source: HiRA (ICLR 2025); field names from PEFT.
    """

    r: int = field(default=32, metadata={"help": "The rank of BA."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "The modules to adapt: a list of names, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: a list of names or a regular expression."}
    )
    hira_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update, in [0, 1)."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether weights are stored as (in, out)."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and save, such as a classifier."}
    )
    init_weights: InitWeights = field(
        default=True,
        metadata={"help": "True or None: start from W0. 'gaussian': the same, A normal. False: random, for tests."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The indices of the layers to adapt, with a list of target modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the list of layers that layers_to_transform is into."}
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "Ranks by module name or regular expression, where not r."}
    )
    weight_gradient: Literal["exact", "int8"] = field(
        default="exact",
        metadata={"help": "'exact', or 'int8': faster and leaner, with noise in the gradients of A and B."},
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "The parameters to adapt, such as the weights of experts: a list of names."}
    )
    hira_alpha: float | None = field(
        default=None, metadata={"help": "LoRA's alpha, to train with LoRA's learning rate. None: the paper's HiRA."}
    )
    alpha_pattern: dict[str, float] | None = field(
        default=None, metadata={"help": "Alphas by module name or regular expression, where not hira_alpha."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Divide hira_alpha by the square root of the rank, not by the rank."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings train in full: ids, or lists of ids by layer name."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Whether layers that share a weight share their adapter, or copy, too."}
    )
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "Ranges [start, end) of layers to stack, sharing their base weights."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HIRA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        check_config(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved: those that PEFT knows, and the others where they differ from their defaults."""
        fields: dict[str, Any] = super().to_dict()
        for name, default in _NOT_IN_PEFT.items():
            if (fields[name] or None) == default:
                del fields[name]
        return fields

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a configuration as PEFT does, and refuse a local folder whose adapter file is broken.

        Raises:
            HiraError: the folder holds an `adapter_model.safetensors` that cannot be read.
        """
        check_adapter_file(Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def rank_of(config: Any, key: str, default: int | None = None) -> int:
    """A module's rank by its name: that of `rank_pattern`, else the default, which is ``config.r`` if not given."""
    patterns = config.rank_pattern or {}
    rank: int = patterns.get(get_pattern_key(patterns.keys(), key), config.r if default is None else default)
    return rank


def config_of_module(config: Any, key: str) -> Any:
    """A configuration whose `hira_alpha` is that of a module, by its name: that of `alpha_pattern`, else its own."""
    patterns = getattr(config, "alpha_pattern", None)  # not in PEFT's config
    if not patterns:
        return config
    own = copy.copy(config)
    own.hira_alpha = patterns.get(get_pattern_key(patterns.keys(), key), config.hira_alpha)
    return own


def check_config(config: Any) -> None:
    """Refuse a configuration with a bad value; takes PEFT's HiraConfig as well as ours."""
    check_rank(config.r, "r")
    if config.rank_pattern is not None and not isinstance(config.rank_pattern, Mapping):
        raise HiraError(f"rank_pattern must map names to ranks, not be {config.rank_pattern!r}.")
    for pattern, rank in (config.rank_pattern or {}).items():
        check_rank(rank, f"rank_pattern[{pattern!r}]")
    dropout = config.hira_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise HiraError(f"hira_dropout must be a number in [0, 1), not {dropout!r}.")
    if isinstance(config, HiraConfig):
        _check_alpha(config)
        _check_token_indices(config.trainable_token_indices)
        _check_layer_replication(config.layer_replication)
    check_init_weights(config.init_weights)
    weight_gradient = getattr(config, "weight_gradient", "exact")
    if weight_gradient not in ("exact", "int8"):
        raise HiraError(f"weight_gradient must be 'exact' or 'int8', not {weight_gradient!r}.")
    check_target_parameters(getattr(config, "target_parameters", None), dropout)
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise HiraError(
                    f"`{name}` cannot be used when `target_modules` is a str: select the layers in the regular "
                    "expression, or pass a list of names."
                )


def check_rank(r: Any, name: str) -> None:
    """Refuse a rank that is not a positive integer."""
    if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
        raise HiraError(f"`r` should be a positive integer, but {name} is {r!r}.")


def _check_alpha(config: HiraConfig) -> None:
    """Refuse an alpha that is not a positive number, and what is said of it where there is none."""
    alpha, patterns = config.hira_alpha, config.alpha_pattern or {}
    if not isinstance(patterns, Mapping):
        raise HiraError(f"alpha_pattern must map names to alphas, not be {patterns!r}.")
    alphas = {f"alpha_pattern[{name!r}]": value for name, value in patterns.items()}
    for name, value in {"hira_alpha": 1 if alpha is None else alpha, **alphas}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise HiraError(f"{name} must be a positive number{' or None' * (name == 'hira_alpha')}, not {value!r}.")
    if not isinstance(config.use_rslora, bool):
        raise HiraError(f"use_rslora must be True or False, not {config.use_rslora!r}.")
    if alpha is None and (patterns or config.use_rslora):
        raise HiraError(
            f"{'alpha_pattern' if patterns else 'use_rslora'} is about the scale that hira_alpha sets, which is None: "
            "set hira_alpha to LoRA's alpha as well."
        )


def _check_token_indices(indices: Any) -> None:
    """Refuse anything but lists of ids, by themselves or by the names of layers."""
    by_layer = indices if isinstance(indices, Mapping) else {"": [] if indices is None else indices}
    for layer, ids in by_layer.items():
        where = f"trainable_token_indices[{layer!r}]" if layer else "trainable_token_indices"
        if not isinstance(ids, list | tuple) or any(not _is_index(i) for i in ids):
            raise HiraError(f"{where} must be a list of ids of tokens, not {ids!r}.")


def _check_layer_replication(ranges: Any) -> None:
    """Refuse anything but a list of ranges [start, end) of layers."""
    if ranges is None:
        return
    if not isinstance(ranges, list | tuple) or not ranges or not all(map(_is_range, ranges)):
        raise HiraError(
            f"layer_replication must be a list of ranges [start, end) of layers, such as [[0, 4], [2, 5]], not "
            f"{ranges!r}."
        )


def _is_range(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_index, value)) and value[0] < value[1]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_init_weights(init_weights: Any) -> None:
    """Refuse an initialisation that does not exist."""
    if not (init_weights is None or isinstance(init_weights, bool) or init_weights == "gaussian"):
        raise HiraError(f"init_weights must be True, False, None or 'gaussian', not {init_weights!r}.")


def check_target_parameters(names: Any, dropout: float) -> None:
    """Refuse anything but a list of names, and dropout, which would have to drop entries of W0 * BA."""
    if names is None:
        return
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) and name for name in names):
        raise HiraError(f"target_parameters must be a list of names, such as ['experts.down_proj'], not {names!r}.")
    if names and dropout:
        raise HiraError(
            f"hira_dropout must be 0 with target_parameters, not {dropout}: the product of an expert's tokens is its "
            "module's own, in which the update has no input of its own to drop."
        )


def check_adapter_file(path: Path) -> None:
    """Refuse a safetensors file whose header does not fit its size; ignore a path where there is no file."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise HiraError(
            f"{path} is not a readable safetensors file ({error}). It may be truncated: copy or download it again."
        ) from error
