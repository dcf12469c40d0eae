"""Targets that name experts and routers as modules, which they were in transformers 4, and which are parameters now."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel

from hira.config.hira_config import rank_of
from hira.errors import HiraError
from hira.files.io.adapter_folder import plain_name
from hira.files.model.architecture import Architecture

# by the name of a parameter: for each module whose weights it holds, the names by which that module may be targeted
OldNames = Mapping[str, list[tuple[str, ...]]]


def target_experts(model: nn.Module, config: Any) -> None:
    """Make a configuration target parameters where its `target_modules` name the modules of transformers 4, as in LoRA.

    A parameter that holds the weights of several modules, such as gate_up_proj, gets the sum of their ranks.

    Args:
        model: the model to adapt.
        config: the HiraConfig, which is changed.

    Raises:
        HiraError: of the modules that one parameter holds, some are targeted and some are not.
    """
    base: Any = getattr(model, "_orig_mod", model)
    if not config.target_modules or not isinstance(base, PreTrainedModel) or not hasattr(config, "target_parameters"):
        return
    old = _old_names(base)
    wanted = []
    for name, modules in old.items():
        found = [names for names in modules if any(_is_targeted(config, path) for path in names)]
        if found and len(found) < len(modules):
            missing = [_last(names[0]) for names in modules if names not in found]
            raise HiraError(
                f"target_modules names {', '.join(_last(names[0]) for names in found)} without also targeting "
                f"{', '.join(missing)}: this model holds them in one parameter, {name}. Target all of them, or none."
            )
        wanted += [name] if found else []
    if not wanted:
        return
    if not isinstance(config.target_modules, str):
        now = [path for path in map(_plain, dict(base.named_modules())) if f"{path}.weight" not in old]
        before = [path for name in wanted for names in old[name] for path in names]
        config.target_modules = {t for t in config.target_modules if _is_end(t, now) or not _is_end(t, before)}
    names = _short(wanted, old)
    ranks = {name: sum(rank_of(config, paths[0]) for paths in old[name]) for name in wanted}
    patterns: dict[str, int] = {}
    for short in set(names.values()):
        of_short = {name: ranks[name] for name in wanted if names[name] == short}
        same = len(set(of_short.values())) == 1
        patterns |= {re.escape(short if same else name): rank for name, rank in of_short.items() if rank != config.r}
    config.rank_pattern = {**(config.rank_pattern or {}), **patterns}
    config.target_parameters = sorted({*(config.target_parameters or ()), *names.values()})
    # a checkpoint may have no factors for them: see `state_dicts.fit_to_checkpoint`
    config.parameters_of_modules = set(names.values())


def _old_names(base: nn.Module) -> OldNames:
    """The former modules of the parameters of experts and of their routers."""
    shapes = {_plain(name): parameter.shape for name, parameter in base.named_parameters()}
    found: dict[str, list[tuple[str, ...]]] = {}
    experts: dict[str, int] = {}  # the number of experts, by the module that holds them and their router
    for name, modules in Architecture(base).experts().items():
        container = name.rpartition(".")[0]
        found[name] = [(f"{container}.{module}", f"{container}.0.{module}") for module in modules]
        experts[container.rpartition(".")[0]] = shapes[name][0]
    for name, module in base.named_modules():
        path, weight = _plain(name), module._parameters.get("weight")
        count = experts.get(path.rpartition(".")[0])
        if weight is not None and weight.dim() == 2 and len(weight) == count and not isinstance(module, nn.Linear):
            found[f"{path}.weight"] = [(path,)]
    return found


def _plain(name: str) -> str:
    return plain_name(name).replace(".base_layer", "")


def _is_targeted(config: Any, path: str) -> bool:
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config = copy.copy(config)
        config.target_modules = [_last(path)]
    return bool(check_target_module_exists(config, path))


def _short(wanted: Collection[str], old: OldNames) -> dict[str, str]:
    """For each wanted name its last part, if all parameters with that last part are wanted, else the name itself."""
    ends = {name: ".".join(name.split(".")[-2 if name.endswith(".weight") else -1 :]) for name in old}
    partial = {ends[name] for name in old if name not in wanted}
    return {name: name if ends[name] in partial else ends[name] for name in wanted}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_end(target: str, paths: Collection[str]) -> bool:
    return any(f".{path}".endswith(f".{target}") for path in paths)
