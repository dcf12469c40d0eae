"""A model of transformers without its weights: names in files, orientations, shared weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from hira.errors import HiraError
from hira.files.io.adapter_folder import plain_name
from hira.files.model.parameters import Location

try:  # from transformers 5 on
    from transformers import conversion_mapping, core_model_loading
except ImportError:
    core_model_loading = None


class Architecture:
    """A model of transformers without its weights: its modules are on the meta device and take next to no memory.

    Args:
        model: the model, on the meta device, or one with adapters, whose names are taken without theirs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        groups: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            groups[id(parameter)].append(name)
        self._tied = {name: tuple(names) for names in groups.values() for name in names}

    def locate(self, tensors: Iterable[str]) -> dict[str, Location | None]:
        """Find the parameters of a model's files.

        Args:
            tensors: the names in the files.

        Returns:
            Where each parameter lies, by its name in the model; None for one whose entries are not in the order of the
            files', as where the query and key of attention are permuted. Names that the model does not have stay what
            they are.
        """
        if core_model_loading is None:
            return {tensor: Location(((tensor,),)) for tensor in tensors}
        conversions = conversion_mapping.get_model_conversion_mapping(self._model)
        converters = [c for c in conversions if isinstance(c, core_model_loading.WeightConverter)]
        renamings = [c for c in conversions if isinstance(c, core_model_loading.WeightRenaming)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, state = self._model.base_model_prefix, self._plain_state()
        found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for tensor in sorted(tensors, key=_numerically):
            name, pattern = core_model_loading.rename_source_key(tensor, renamings, converters, prefix, state)
            found[name][pattern].append(tensor)
        return {name: _location(parts, by_pattern) for name, parts in found.items()}

    def experts(self) -> dict[str, tuple[str, ...]]:
        """By the name of each parameter that stacks what transformers 4 had in modules, those modules' last names."""
        if core_model_loading is None:
            return {}
        found = {}
        for converter in conversion_mapping.get_model_conversion_mapping(self._model):
            steps = [type(step).__name__ for step in getattr(converter, "operations", ())]
            if steps[:1] != ["MergeModulelist"] or len(converter.target_patterns) != 1:
                continue
            end = re.sub(r"\W", "", converter.target_patterns[0].rpartition(".")[2])
            modules = [re.findall(r"(\w+)\W*\.weight", pattern) for pattern in converter.source_patterns]
            for name, tensor in self._plain_state().items():
                if name.endswith(f".{end}") and tensor.dim() == 3 and all(modules):
                    found[name] = tuple(module[-1] for module in modules)
        return found

    def _plain_state(self) -> dict[str, Tensor]:
        """The parameters and buffers by their names without those of adapters' layers and of wrappers."""
        tensors = (*self._model.named_parameters(), *self._model.named_buffers())
        return {plain_name(name).replace(".base_layer", ""): tensor for name, tensor in tensors}

    def absent(self, found: Container[str]) -> list[str]:
        """The parameters, none of those tied to them included, that are not among the found, as parts of others are."""
        return [name for name in self._parameters if not any(other in found for other in self.tied(name))]

    def is_transposed(self, name: str) -> bool:
        """Whether a parameter, or each of the matrices that it stacks, is (in, out)."""
        owner = self._model.get_submodule(name.rpartition(".")[0]) if name in self._parameters else None
        return isinstance(owner, Conv1D) or bool(getattr(owner, "is_transposed", False))

    def tied(self, name: str) -> tuple[str, ...]:
        """The names of the parameters that share one weight with a parameter, it included; those tied to it follow."""
        return self._tied.get(name, (name,))

    def embeddings(self) -> tuple[str, ...]:
        """The names of the weights that `tie_word_embeddings` speaks of: those of input and output embeddings."""
        try:
            layers = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        except NotImplementedError:  # transformers' way to say that there are none
            return ()
        names = {id(module): name for name, module in self._model.named_modules()}
        return tuple(f"{names[id(layer)]}.weight" for layer in layers if layer is not None)


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture | None:
    """Return the architecture that a configuration describes.

    Args:
        config: what `config.json` says.
        where: its file, for messages.

    Returns:
        The architecture; None for one that transformers does not have, such as one of code beside the weights, for
        which parameters lie in files under their own names.

    Raises:
        HiraError: transformers has the architecture, but cannot make it from this configuration.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_type = config.get("model_type")
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        return None
    if not known or config.get("auto_map"):
        return None
    try:
        with torch.device("meta"):
            config_class = CONFIG_MAPPING[model_type]
            # from transformers 5 on, which writes {"__float__": "Infinity"} where JSON has no number
            decode = getattr(config_class, "_decode_special_floats", dict)
            return Architecture(model_class(config_class.from_dict(decode(dict(config)))))
    except Exception as error:  # a configuration may be wrong in any way
        raise HiraError(
            f"{where} does not describe a {name} of transformers {transformers.__version__}: "
            f"{' '.join(str(error).split())}. Install the version that the model was made with, or correct the file."
        ) from error


def _location(parts: Mapping[str | None, list[str]], converters: Mapping[str, Any]) -> Location | None:
    """Where a parameter lies whose tensors were found by some patterns, each of a converter, or by name alone."""
    patterns = [pattern for pattern in parts if pattern is not None]
    if not patterns:
        tensors = parts[None]
        return Location((tuple(tensors),)) if len(tensors) == 1 else None
    converter = converters[patterns[0]]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    sources = [parts.get(pattern, []) for pattern in converter.source_patterns]
    if steps[:1] != [("MergeModulelist", 0)] or steps[1:] != [("Concatenate", 1)] * (len(sources) > 1):
        return None
    if len({len(source) for source in sources}) != 1:
        return None
    return Location(tuple(zip(*sources, strict=True)), stacked=True)


def _numerically(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts)]
