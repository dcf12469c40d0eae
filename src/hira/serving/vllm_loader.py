"""vLLM's load format "hira": a base model whose weights become W' = W0 * (1 + BA) as they are loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from hira.errors import HiraError
from hira.files.io.recognise import SINGLE
from hira.files.merge.merged_model import MergedModel, adapter_folders, adapter_weights, merged_model
from hira.files.merge.plan import Options

TIES = "tie_word_embeddings"
_logger = logging.getLogger("vllm.hira")  # below vLLM's own, whose handlers print it


class Settings(NamedTuple):
    """What `--model-loader-extra-config` has for hira; the names are the arguments of `merge_checkpoint`."""

    adapters: list[Any]
    weights: list[float]
    any_base: bool
    allow_pickle: bool


class HiraModelLoader(DefaultModelLoader):
    """vLLM's default loader, with HiRA adapters in the weights that it loads.

    Equation: ``W' = W0 * (1 + sum_i w_i B_i A_i)``, in the place of each W0 that the adapters are on.

    vLLM gets the tensors that `hira merge` would write, with the same bits where PyTorch has as many threads, before it
    joins, shards or quantises any; one of them is in memory at a time. The adapters are checked before any weight is
    loaded.

    Args:
        load_config: vLLM's, with `adapters` in its `model_loader_extra_config`, and maybe `weights`, `any_base` and
            `allow_pickle`. What else is there is for the default loader.

    Raises:
        HiraError: no adapter is given, or a setting is not what it should be; from the methods, as of
            `merge_checkpoint`, and where a merged model would need another vocabulary than the engine was made for.

    Source: HiRA (ICLR 2025), equation 5.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._settings, others = _settings(load_config.model_loader_extra_config)
        super().__init__(replace(load_config, load_format="hf", model_loader_extra_config=others))
        # what is merged, once it is checked; a model that drafts for it is loaded as it is
        self._model, self._merged = "", None  # type: str, MergedModel | None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Make and load a model; one that adapters are on only once they are checked."""
        speculative = vllm_config.speculative_config
        target = vllm_config.model_config if speculative is None else speculative.target_model_config
        self._model = target.model
        if model_config.model == target.model and _unties(self._prepare(model_config)):
            for config in (model_config.hf_config, model_config.hf_config.get_text_config()):
                setattr(config, TIES, False)
        model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return model

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the merged model; adapters for a model that is in memory already are checked here."""
        if not self._model:
            if model_config.is_moe:
                raise HiraError(
                    f"{model_config.model} has experts. vLLM was seen to keep their old weights where it loads others "
                    "in place, so other adapters take a restart."
                )
            merged = self._prepare(model_config)
            # vLLM ties a head of the files' own again where it is the same
            tied, own = getattr(model_config.hf_config, TIES, False), model_config.word_embeddings_untied_by_checkpoint
            if tied or own if _unties(merged) else not (tied or own) and merged.parameters.config.get(TIES):
                raise HiraError(
                    f"{', '.join(str(adapter.path) for adapter in merged.adapters)}: the head and the embeddings share "
                    "a weight with these adapters or in the model that is served, and not in the other. Restart vLLM."
                )
            with _silent_about_threads():
                for _ in merged.tensors((name, torch.empty(0)) for name in merged.plan.changed):
                    pass  # W' that is not finite is found before a weight changes
        tensors: Iterator[tuple[str, Tensor]] = super().get_all_weights(model_config, model)
        return tensors

    def _prepare(self, model_config: ModelConfig) -> MergedModel:
        """Check the adapters against a model, and plan its tensors."""
        self._model = model_config.model
        revision = "" if model_config.revision is None or os.path.isdir(self._model) else f"@{model_config.revision}"
        adapters, weights, any_base, allow_pickle = self._settings
        merged = merged_model(
            f"{self._model}{revision}", adapters, weights, Options(), any_base=any_base, allow_pickle=allow_pickle
        )
        _check_sizes(merged)
        plan = merged.plan
        for note in merged.notes:
            _logger.warning("HiRA: %s", note)
        counts = len(plan.merged), len(plan.replaced), len(plan.added), len(merged.folder.tensors)
        _logger.info("HiRA: %d tensors merged, %d replaced, %d added, of %d", *counts)
        self._merged = merged
        return merged

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, Tensor]]:
        merged, tensors = self._merged, super()._get_weights_iterator
        if merged is None or source.model_or_path != self._model:
            yield from tensors(source)
            return
        # the very files that were checked, which the hub's cache may have elsewhere than vLLM's downloads
        files = [SINGLE] if merged.folder.index is None else None
        checked = replace(source, model_or_path=str(merged.folder.path), revision=None, allow_patterns_overrides=files)
        with _silent_about_threads():
            yield from merged.tensors(tensors(checked))


def _settings(extra: Any) -> tuple[Settings, dict[str, Any]]:
    """hira's settings of the loader's extra configuration, and the others."""
    if not isinstance(extra, dict) or "adapters" not in extra:
        raise HiraError(
            f"the load format hira needs the folders of adapters, such as --model-loader-extra-config "
            f'\'{{"adapters": ["DIR"]}}\', and not {extra!r}.'
        )
    others = dict(extra)
    folders = adapter_folders(others.pop("adapters"))
    weights = adapter_weights(folders, others.pop("weights", None))
    flags = [others.pop(name, False) for name in ("any_base", "allow_pickle")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise HiraError(f"any_base and allow_pickle must be true or false, not {flags}.")
    return Settings(folders, weights, *flags), others


@contextmanager
def _silent_about_threads() -> Iterator[None]:
    """On a CPU vLLM lets nobody set the number of threads, and would say so several times at each block of W'."""

    def is_of_else(record: logging.LogRecord) -> bool:
        return "torch.set_num_threads" not in record.getMessage()

    worker = logging.getLogger("vllm.v1.worker.cpu_worker")
    worker.addFilter(is_of_else)
    try:
        yield
    finally:
        worker.removeFilter(is_of_else)


def _unties(merged: MergedModel) -> bool:
    """Whether the head of the merged model has a weight of its own where it shared that of the embeddings."""
    return merged.plan.config is not None and merged.plan.config.get(TIES) is False


def _check_sizes(merged: MergedModel) -> None:
    """Refuse a vocabulary of another size: the engine is made for the base model's, in other processes too."""
    for name, planned in merged.plan.changed.items():
        shape = merged.folder.tensors[name][1].shape
        if planned.entry.shape != shape:
            raise HiraError(
                f"the adapters make {name} {planned.entry.shape}, and vLLM was started for {shape} of "
                f"{merged.folder.path}: write the merged model by `hira merge`, and serve its folder."
            )
