"""Writes the tables of docs/support.md from the names of the tests, as pytest collects them: python tests/support.py"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from base_layers import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/support.md"
BEGIN, END = "<!-- tests/support.py writes {} from here -->\n", "<!-- to here -->\n"
# layers, and what the ids of tests call them
LAYERS = {
    "`nn.Linear`": r"linear\b|bias",
    "`Conv1D` of Transformers": r"Conv1D",
    "`nn.Embedding`": r"embedding",
    "`nn.Conv1d`, `Conv2d`, `Conv3d`": r"\b[123]d\b|conv\b|convolution",
    "convolutions with groups": r"grouped|depthwise",
    "`nn.MultiheadAttention`": r"attention",
    "stacked experts": r"experts|mixtral|gpt_oss",
}
# what can be asked of a layer, and the tests of it
OPERATIONS = {
    "forward and gradients": (
        "test_layer.py::test_forward_and_gradients",
        "test_parity.py::test_outputs_and_gradients",
        "test_attention.py::test_outputs_and_gradients",
        "test_experts.py::test_experts_compute_the_equation_and_only_where_there_are_tokens",
    ),
    "nothing of a weight's size kept": (
        "test_layer_cost.py::test_nothing_of_the_weights_size_is_kept_but_the_weight",
        "test_attention.py::test_nothing_weight_sized_is_kept_but_the_base_weights",
        "test_experts.py::test_nothing_weight_sized_is_kept_for_backward",
    ),
    "exact merge": (
        "test_merging.py::test_unmerging_is_exact",
        "test_attention_models.py::test_merging_is_exact_and_undone_bit_for_bit",
        "test_experts.py::test_merging_writes_the_weights_of_the_forward_and_back",
    ),
    "scales": ("test_scales.py::test_a_scale_multiplies_BA",),
    "weighted sums": ("test_weighted_adapters.py::test_the_sum_is_exact",),
    "hot-swapping": ("test_hot_swapping.py::test_a_swapped_adapter_computes_as_a_loaded_one",),
    "with LoRA": ("test_hilora.py::test_outputs_and_gradients_are_those_of_the_equation",),
    "dropout": (
        "test_dropout.py::test_dropout_is_on_the_input_of_the_update",
        "test_dropout.py::test_dropout_of_an_embedding_drops_whole_tokens",
    ),
    "`torch.compile`": (
        "test_layer.py::test_compiled_as_one_graph_for_all_lengths",
        "test_attention.py::test_compiled",
    ),
    "second derivatives": ("test_transforms.py::test_second_derivatives",),
    "export, ONNX": ("test_transforms.py::test_onnx",),
}
# tests of a net with a layer of each kind, tests/every_kind.py, whose ids name none
EVERY_KIND = ("test_weighted_adapters.py", "test_hot_swapping.py", "test_hilora.py")
# tests of one kind of layer
ONE_KIND = {"test_attention": "attention", "test_experts": "experts"}
STORAGES = "test_storages.py"
STORAGE_OPERATIONS = {
    "forward and gradients": "test_forward_and_gradients",
    "training": "test_trained",
    "merge": "test_a_merge_stores_the_sum",
    "exact unmerge": "test_unmerging_is_exact",
    "several adapters, dropout": "test_several_adapters_and_dropout",
    "mixed batches": "test_mixed_batch",
    "save and load": "test_saved_and_loaded",
}
FAMILIES = {
    "dense": r"nn\.Linear|Conv1D",
    "bitsandbytes, 4 bits": r"Linear4bit",
    "bitsandbytes, 8 bits": r"Linear8bitLt",
    "torchao": r"Int8Tensor|Float8Tensor|IntxUnpacked",
    "HQQ": r"HQQLinear",
    "GPTQ": r"GPTQ",
    "AWQ": r"AWQ",
    "AQLM": r"codebook",
}


FILES = sorted({test.partition("::")[0] for tests in OPERATIONS.values() for test in tests} | {STORAGES})


def collected() -> list[str]:
    """The ids of the tests of these files, such as tests/test_layer.py::test_forward_and_gradients[bias]."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{file}" for file in FILES]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in printed.splitlines() if "::" in line]


def layers(ids: Sequence[str]) -> list[str]:
    """The table of layers and operations."""
    rows = []
    for layer, names in LAYERS.items():
        cells = [_cell(any(_is_of(ids, test, names) for test in tests)) for tests in OPERATIONS.values()]
        rows.append((layer, *cells))
    return table(("", *OPERATIONS), rows)


def storages(ids: Sequence[str]) -> list[str]:
    """The table of ways to store a weight and operations."""
    rows = []
    for family, names in FAMILIES.items():
        cells = [_cell(_is_found(ids, f"{STORAGES}::{test}", names)) for test in STORAGE_OPERATIONS.values()]
        rows.append((family, *cells))
    return table(("", *STORAGE_OPERATIONS), rows)


def _is_of(ids: Sequence[str], test: str, names: str) -> bool:
    """Whether a test is of a layer that ids call so."""
    file = test.partition("::")[0]
    if file in EVERY_KIND:
        return _is_found(ids, test, "")
    for start, kind in ONE_KIND.items():
        if file.startswith(start):
            return bool(re.search(names, kind)) and _is_found(ids, test, "")
    return _is_found(ids, test, names)


def _is_found(ids: Sequence[str], test: str, names: str) -> bool:
    found = [name.partition("::")[2] for name in ids if name.partition("[")[0] == f"tests/{test}"]
    assert found, f"there is no test {test}"
    return any(re.search(names, name) for name in found)


def _cell(is_tested: bool) -> str:
    return "yes" if is_tested else ""


TABLES = {"layers": layers, "storages": storages}


def with_tables(page: str, ids: Sequence[str]) -> str:
    """The page with each table between its two marks, from the ids of all tests of FILES."""
    for name, rows in TABLES.items():
        before, begin, rest = page.partition(BEGIN.format(name))
        assert begin, f"the page has no mark for {name}"
        page = before + begin + "\n".join(rows(ids)) + "\n" + END + rest.partition(END)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), collected()))
