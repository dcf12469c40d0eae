"""Weights that are quantised in the files: refused where an adapter is on them, copied where none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
from merge_cases import EXPERTS, gpt_oss
from merging import assert_same_tensors, hira_config, made, tensors_of
from torch import Tensor

from hira import HiraError
from hira.files.merge.merge_checkpoint import merge_checkpoint


def narrowed(dtype: torch.dtype) -> Callable[[dict[str, Tensor], str], None]:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    return change


def packed(*ends: str) -> Callable[[dict[str, Tensor], str], None]:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        stem = name.removesuffix("weight")
        del tensors[name]
        tensors.update({stem + end: torch.ones(4, 2, dtype=torch.int32) for end in ends})

    return change


QUANTISED: dict[str, tuple[Any, str]] = {
    "float8": (narrowed(torch.float8_e4m3fn), "weight of torch.float8_e4m3fn"),
    "int8": (narrowed(torch.int8), "weight of torch.int8"),
    "uint8": (lambda tensors, name: tensors.update({name: torch.ones(128, 1, dtype=torch.uint8)}), "torch.uint8"),
    "GPTQ": (packed("qweight", "qzeros", "scales"), "q_proj.qweight"),
    "HQQ": (packed("W_q"), "q_proj.W_q"),
    "compressed-tensors": (packed("weight_packed", "weight_scale"), "q_proj.weight_packed"),
    "AQLM": (packed("codes", "codebooks"), "q_proj.codes"),
}


@pytest.mark.parametrize(("change", "found"), QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_quantised_weights(known, change, found, tmp_path):
    """An adapter on them is refused; one on others merges, and they are copied."""
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj", "v_proj"), hira_config("v_proj")])
    folders.rewrite(lambda tensors: change(tensors, "model.layers.1.self_attn.q_proj.weight"))
    folders.configure(quantization_config={"quant_method": "some"}, **({} if known else {"model_type": "mystery"}))
    message = (
        rf"does not have the weight of module 'model\.layers\.1\.self_attn\.q_proj' as real numbers, but .*{found}.*: "
        r"it is quantised, .*Pass the model as it was before"
    )
    with pytest.raises(HiraError, match=message):
        folders.merge()
    assert not (tmp_path / "out").exists()
    report = merge_checkpoint(folders.base, folders.adapters[1], tmp_path / "out")
    base, merged = tensors_of(folders.base), tensors_of(tmp_path / "out")
    assert {*report.merged} == {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}
    assert_same_tensors(
        {k: v for k, v in merged.items() if k not in report.merged},
        {k: v for k, v in base.items() if k not in report.merged},
    )


@pytest.mark.parametrize("ends", [EXPERTS, EXPERTS[:1]], ids=str)
def test_quantised_experts(ends, tmp_path):
    """As the files of gpt-oss have them, in MXFP4."""
    configs = [hira_config("q_proj", target_parameters=EXPERTS), hira_config("q_proj")]
    folders = made(tmp_path, gpt_oss(), configs)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(tuple(ends))]:
            del tensors[name]
            tensors[f"{name}_blocks"] = torch.ones(3, 48, 1, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.ones(3, 48, 1, dtype=torch.uint8)

    folders.rewrite(change)
    with pytest.raises(HiraError, match=r"as real numbers, but model.*\.gate_up_proj_blocks: it is quantised"):
        folders.merge()
    report = merge_checkpoint(folders.base, folders.adapters[1], tmp_path / "out")
    assert len(report.merged) == 2
