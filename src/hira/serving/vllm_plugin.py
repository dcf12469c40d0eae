"""The entry point by which vLLM finds hira's loader; every process of vLLM calls it."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the load format "hira". Safe to repeat."""
    from vllm.model_executor.model_loader import register_model_loader

    from hira.serving.vllm_loader import HiraModelLoader

    register_model_loader("hira")(HiraModelLoader)
