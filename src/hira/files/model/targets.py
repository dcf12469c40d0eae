"""The parameters that adapters change, and for each the factors of all adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import Adapter, Factors, TensorFile, dtypes_and_shapes, stacked
from hira.files.model.parameters import IN_MEMORY, Parameters, StoredMatrix, matrices_of
from hira.files.model.quantisation import check_real

_BLOCK = 16 << 20
# what PEFT calls the rows of an embedding that `trainable_token_indices` names
_ROWS = ".token_adapter.trainable_tokens_delta"
# of PEFT's tasks, those of models without a head that predicts tokens
_OTHER_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Target:
    """A parameter with the factors on it.

    Args:
        name: its name in the model.
        experts: how many matrices it stacks; None if it is one by itself.
        transposed: whether it, or each of the matrices, is stored as (in, out).
        factors: those of each adapter in their order, with the number that its BA is multiplied by.
    """

    name: str
    experts: int | None
    transposed: bool
    factors: list[tuple[Factors, float]] = field(default_factory=list)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Read for each matrix A (r, in) and B (out, r) of the summed rank, so that ``W' = W0 * (1 + BA)``.

        For a parameter stored as (in, out) they are those of its transpose. A convolution's kernels are flattened.
        """
        As, Bs = zip(*(_weighted(factors, weight) for factors, weight in self.factors), strict=True)
        if self.experts is None:
            return [(torch.cat(As), torch.cat(Bs, dim=1))]
        A = torch.cat([A.reshape(self.experts, -1, A.shape[1]) for A in As], dim=1)
        B = torch.cat([B.reshape(len(B), -1, self.experts) for B in Bs], dim=1).permute(2, 0, 1)
        return list(zip(A.unbind(0), B.unbind(0), strict=True))


class SavedParameter(NamedTuple):
    """A parameter that an adapter saves whole, as of `modules_to_save`; `key` is its name in the adapter's file."""

    adapter: Adapter
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def matrix(self) -> StoredMatrix:
        """Its entries, with all but the first dimension flattened."""
        tensors = self.adapter.tensors
        if isinstance(tensors, TensorFile):
            return matrices_of(tensors.header, tensors.header.entry(self.key))[0]
        whole = tensors[self.key].reshape(self.shape[0] if self.shape else 1, -1)
        return StoredMatrix(len(whole), whole.shape[1], whole.dtype, lambda rows: whole[rows])

    def equals(self, other: SavedParameter) -> bool:
        """Whether another adapter saves the same."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        first, second = self.matrix(), other.matrix()
        return all(torch.equal(first.read(rows), second.read(rows)) for rows in first.row_blocks(_BLOCK))


class Changes(NamedTuple):
    """The changes that adapters make to a model.

    Args:
        targets: the parameters with factors on them, by name.
        saved: those that adapters save whole, by name; of one that is a target too, it is W0.
        prefix: what has to stand before the names of the base model's parameters for those of the adapters' model.
    """

    targets: dict[str, Target]
    saved: dict[str, SavedParameter]
    prefix: str


def changes_of(
    parameters: Parameters, adapters: Sequence[Adapter], weights: Sequence[float], merging: bool = True
) -> Changes:
    """Find the parameters that adapters change.

    Args:
        parameters: those of the base model.
        adapters: the adapters; what they do adds up.
        weights: a number for each, by which its BA is multiplied.
        merging: whether the model is to be written, with the weights that share one with those that change.

    Returns:
        The changes, by the names of the base model's parameters.

    Raises:
        HiraError: the base model lacks the parameter of a pair of factors, has it quantised or in another shape, the
            files have another layout than the model, two adapters save the same parameter, or it cannot be told
            which side of a square matrix is its inputs, or which weights are tied to each other.
    """
    targets: dict[str, Target] = {}
    saved: dict[str, SavedParameter] = {}
    prefixes = set()
    for given, weight in zip(adapters, weights, strict=True):
        _check_layers(given)
        adapter, named, prefix = _naming(parameters, given)
        prefixes.add(prefix)
        for other, key in adapter.others.items():
            if ".original_module." in other:  # PEFT saves it beside a resized embedding of `modules_to_save`
                continue
            if other.endswith(_ROWS):
                if merging:
                    raise HiraError(
                        f"The adapter {adapter.path} has trainable_token_indices, rows of {other.removesuffix(_ROWS)} "
                        f"that were trained whole, which are not merged from files. {IN_MEMORY}"
                    )
                continue
            name = named(other).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            dtype, shape = dtypes_and_shapes(adapter.tensors)[key]
            new = SavedParameter(adapter, key, shape, dtype)
            if name in saved and not new.equals(saved[name]):
                raise HiraError(
                    f"The adapters {saved[name].adapter.path} and {adapter.path} both save {name} whole, with other "
                    "numbers; merge one adapter, and save the other without it."
                )
            saved[name] = new
        own = {}
        for module, factors in adapter.modules.items():
            target = _target(parameters, adapter, named(module), factors, saved)
            own[target.name] = target
            targets.setdefault(target.name, target).factors.append((factors, weight))
        if not parameters.is_known:
            _check_squares(parameters, adapter, own, targets)
        if prefix and merging:
            _check_head(parameters, adapter, own.keys() | saved.keys())
    if len(prefixes) > 1:
        raise HiraError(f"The adapters were made for models that name their parameters differently. {IN_MEMORY}")
    return Changes(targets, saved, prefixes.pop())


def _check_layers(adapter: Adapter) -> None:
    """Refuse an adapter of a model that has other layers than the files of the base model."""
    if (ranges := adapter.config.get("layer_replication")) is not None:
        raise HiraError(
            f"The adapter {adapter.path} has layer_replication {ranges}: its layers are not those of the base model's "
            "files. Load the base model and the adapter with PEFT; merge_and_unload() merges in memory."
        )


def _given_and_renamed(parameters: Parameters, given: Adapter) -> Iterator[Adapter]:
    yield given
    yield _renamed(parameters, given)


def _renamed(parameters: Parameters, adapter: Adapter) -> Adapter:
    """An adapter under the names of the model's modules now, where it has those of an older transformers.

    Transformers' table of conversions says which they are. Experts that were modules are a parameter together, and so
    are their factors.
    """
    modules = {f"{name}.weight": name for name in adapter.modules if not _candidates(parameters, adapter, name)}
    others = [name for name in adapter.others if parameters.holder(name) is None]
    found = {name: factors for name, factors in adapter.modules.items() if f"{name}.weight" not in modules}
    for name, location in parameters.locate(modules).items():
        if location is None or parameters.holder(name) is None:
            continue
        parts = tuple(tuple(adapter.modules[modules.pop(tensor)] for tensor in each) for each in location.tensors)
        if location.stacked:
            (first, *_), *_ = parts
            pairs = [[tuple(torch.empty(s, device="meta") for s in part.shapes) for part in each] for each in parts]
            A, B = stacked(f"{name} of {parameters.folder.path}", pairs)  # type: ignore[arg-type]
            found[name] = Factors(adapter.tensors, first.keys, (tuple(A.shape), tuple(B.shape)), "matrix", parts)
        else:
            found[name.removesuffix(".weight")] = parts[0][0]
    found |= {name: adapter.modules[name] for name in modules.values()}
    names = {name: next(iter(parameters.locate([name]))) for name in others}
    return replace(adapter, modules=found, others={names.get(n, n): key for n, key in adapter.others.items()})


def _naming(parameters: Parameters, given: Adapter) -> tuple[Adapter, Callable[[str], str], str]:
    """An adapter, how its names become those of the base model's parameters, and the prefix that those lack.

    An adapter may have been trained on the model with its head where the base is the model without, or the reverse:
    then all names differ by a first component, which transformers adds or removes as it loads. Or it may have been
    trained with an older transformers.
    """
    missing: list[str] = []
    for adapter in _given_and_renamed(parameters, given):
        modules = list(adapter.modules)
        first = {module.partition(".")[0] for module in modules}
        rules: list[tuple[Callable[[str], str], str]] = [(lambda name: name, "")]
        if len(first) == 1:
            prefix = f"{first.pop()}."
            rules.append((lambda name, removed=prefix: name.removeprefix(removed), prefix))  # type: ignore[misc]
        for component in dict.fromkeys(name.partition(".")[0] for name in parameters.locations):
            rules.append((lambda name, added=f"{component}.": f"{added}{name}", ""))  # type: ignore[misc]
        for named, prefix in rules:
            absent = [module for module in modules if not _candidates(parameters, adapter, named(module))]
            if not absent:
                return adapter, named, prefix
            for module in absent:
                check_real(parameters, module, _names(adapter, named(module)))
            missing = missing or absent
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise HiraError(
        f"The model {parameters.folder.path} has no parameters for {', '.join(missing[:5])}{more} of the adapter "
        f"{given.path}. Either the adapter is of another model, or the files of this architecture name their tensors "
        f"otherwise than its modules. {IN_MEMORY}"
    )


def _candidates(parameters: Parameters, adapter: Adapter, module: str) -> list[str]:
    """The parameters of the base model that a module's factors may be on."""
    return [name for name in _names(adapter, module) if parameters.holder(name) is not None]


def _names(adapter: Adapter, module: str) -> list[str]:
    """The names that they may have; joined factors have the name of their parameter."""
    plain = module.replace(".base_layer", "")
    return list(dict.fromkeys((*_targeted(adapter, plain), f"{plain}.weight", f"{plain}.in_proj_weight", plain)))


def _targeted(adapter: Adapter, module: str) -> list[str]:
    """The parameters of a module that an adapter's `target_parameters` name."""
    ends = adapter.config.get("target_parameters")
    ends = [end for end in ends if isinstance(end, str)] if isinstance(ends, list) else []
    names = [(f"{module}.{end.rpartition('.')[2]}", end) for end in ends]
    return [name for name, end in names if f".{name}".endswith(f".{end}")]


def _target(
    parameters: Parameters, adapter: Adapter, module: str, factors: Factors, saved: Mapping[str, SavedParameter]
) -> Target:
    """The parameter that a module's factors are on."""
    names = _candidates(parameters, adapter, module)
    check_real(parameters, module, _names(adapter, module))
    shapes = {name: saved[name].shape if name in saved else parameters.shape(name) for name in names}
    by_name = _targeted(adapter, module.replace(".base_layer", ""))
    fitting: list[Target] = []
    for name, shape in shapes.items():
        known = parameters.is_transposed(name)
        if len(shape) == 2 and name in by_name:  # a matrix that is adapted as a parameter is taken as it is
            known = False
        elif len(shape) == 2 and known is None and shape[0] == shape[1]:
            known = bool(adapter.config.get("fan_in_fan_out"))
        fitting += _fitting(name, shape, factors, known)
    if len(fitting) == 1:
        return fitting[0]
    A, B = factors.shapes
    raise HiraError(
        f"The factors of {module} in the adapter {adapter.path}, A {A} and B {B}, "
        f"{'fit in more than one way' if fitting else 'do not fit'} the parameters of {parameters.folder.path}: "
        f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}. "
        + (IN_MEMORY if fitting else "The adapter is of another model; pass the one that it was trained on.")
    )


def _fitting(name: str, shape: tuple[int, ...], factors: Factors, known: bool | None) -> list[Target]:
    """The ways in which factors fit a parameter; `known` is whether it is stored as (in, out)."""
    A, B = factors.shapes
    if factors.kind != "matrix":
        whole = (B[0], *A[1:]) if factors.kind == "convolution" else (A[1], B[0])
        return [Target(name, None, False)] if shape == whole else []
    if len(shape) not in (2, 3) or (len(shape) == 3 and A[0] % max(shape[0], 1)):
        return []
    experts = shape[0] if len(shape) == 3 else None
    ways = {False: (B[0], A[1]), True: (A[1], B[0])}
    return [Target(name, experts, way) for way, ends in ways.items() if shape[-2:] == ends and known in (None, way)]


def _check_squares(
    parameters: Parameters, adapter: Adapter, own: Mapping[str, Target], targets: Mapping[str, Target]
) -> None:
    """Refuse square matrices where `fan_in_fan_out` is not true of the adapter's other matrices, or another adapter."""
    said = bool(adapter.config.get("fan_in_fan_out"))
    matrices = [name for name in own if targets[name].factors[0][0].kind == "matrix" and own[name].experts is None]
    shapes = {name: parameters.shape(name) for name in matrices}
    square = next((name for name, shape in shapes.items() if shape[0] == shape[1]), None)
    other = next((name for name in shapes if {own[name].transposed, targets[name].transposed} != {said}), None)
    if square is not None and other is not None:
        raise HiraError(
            f"Whether {square} {shapes[square]} of {parameters.folder.path} is stored as (in, out) cannot be told: the "
            f"adapter {adapter.path} says fan_in_fan_out {said}, {other} {shapes[other]} is otherwise, and the "
            f"architecture is not one that this transformers has. {IN_MEMORY}"
        )


def _check_head(parameters: Parameters, adapter: Adapter, names: Collection[str]) -> None:
    """Refuse to change embeddings to which the head is tied that only the adapter's model has."""
    table = next((table for table in parameters.embeddings() if table in names), None)
    ties = parameters.config.get("tie_word_embeddings", True) and adapter.config.get("task_type") not in _OTHER_HEADS
    if table is not None and ties:
        raise HiraError(
            f"The adapter {adapter.path} is of a model with a head, which may share the weight {table} with it, and "
            f"{parameters.folder.path} is without that head. Pass the base model with its head; or, if there is "
            f"none that predicts tokens, set the adapter's task_type to one of {', '.join(_OTHER_HEADS)}."
        )


def _weighted(factors: Factors, weight: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), B times its weight; in an embedding's table rows are the outputs."""
    A, B = (factor.flatten(1) for factor in factors.pair())
    if weight != 1:
        B = B.to(torch.promote_types(B.dtype, torch.float32)) * weight
    return (B.t(), A.t()) if factors.kind == "embedding" else (A, B)
