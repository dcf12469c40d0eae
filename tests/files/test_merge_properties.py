"""Merges of random models: what forming in memory gives, in files that safetensors reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_folders import bytes_of, save_adapter, save_model
from safetensors import safe_open
from safetensors.torch import save

from hira import merge_checkpoint
from hira.files.io import output_file
from hira.files.io.model_folder import INDEX, SINGLE
from hira.files.io.safetensors_file import CODES
from hira.files.merge import tensors as merge_tensors
from hira.ops import heuristics, reference
from hira.ops.effective_weight import form

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = sorted(set(CODES) - set(FLOATS), key=str)
sizes = st.integers(1, 5)
modules = st.lists(st.text("ab0_é-", min_size=1, max_size=4), min_size=1, max_size=3).map(".".join)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(some, other):
    return some.dtype == other.dtype and some.shape == other.shape and torch.equal(bits(some), bits(other))


def some(shape, dtype):
    """Random entries, of any dtype, that are finite where they can be otherwise."""
    if dtype in FLOATS:
        return torch.randn(shape).to(dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 2, (torch.Size(shape).numel() * size,), dtype=torch.uint8).view(dtype).reshape(shape)


@st.composite
def models(draw):
    """Files with tensors, and the factors on some: by module A, B and whether they are those of an embedding."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors, factors = {}, {}
    for module in draw(st.lists(modules, min_size=1, max_size=4, unique=True)):
        kind = draw(st.sampled_from(["matrix", "embedding", "convolution"]))
        rows, columns, rank = draw(sizes), draw(sizes), draw(sizes)
        kernel = draw(st.lists(sizes, min_size=1, max_size=3)) if kind == "convolution" else []
        tensors[f"{module}.weight"] = some((rows, columns, *kernel), draw(st.sampled_from(FLOATS)))
        dtypes = st.sampled_from(FLOATS)
        if kind == "embedding":
            A, B = some((rank, rows), draw(dtypes)), some((columns, rank), draw(dtypes))
        else:
            A, B = some((rank, columns, *kernel), draw(dtypes)), some((rows, rank, *[1] * len(kernel)), draw(dtypes))
        factors[module] = A, B, kind == "embedding"
    shapes = st.lists(st.integers(0, 4), max_size=3)
    for name in draw(st.lists(modules, max_size=5, unique=True)):
        tensors[f"{name}.other"] = some(draw(shapes), draw(st.sampled_from(FLOATS + OTHERS)))
    names = draw(st.permutations(list(tensors)))
    count = draw(st.integers(1, 3))
    files = {} if count > 1 else {SINGLE: dict.fromkeys(names)}
    for name in names if count > 1 else []:
        files.setdefault(f"part{draw(st.integers(1, count))}.safetensors", {})[name] = None
    return {file: {name: tensors[name] for name in held} for file, held in files.items()}, factors


def changed(tensors, factors, weights, dtype):
    """The merged tensors, formed in memory."""
    result = {name: t.to(dtype) if dtype and t.dtype in FLOATS else t for name, t in tensors.items()}
    for module, (A, B, is_embedding) in factors.items():
        W0 = tensors[f"{module}.weight"]
        A, B = A.flatten(1), B.flatten(1)
        # each adapter is the same one, with a weight of its own
        A = torch.cat([A] * len(weights))
        wide = torch.promote_types(B.dtype, torch.float32)
        B = torch.cat([B.to(wide) * weight if weight != 1 else B for weight in weights], dim=1)
        A, B = (B.t(), A.t()) if is_embedding else (A, B)
        result[f"{module}.weight"] = formed = form(W0.flatten(1), A, B, 0, dtype or W0.dtype).reshape(W0.shape)
        exact = reference.modulated_weight(W0.flatten(1).double(), A.double(), B.double()).reshape(W0.shape)
        # a dither moves an entry by less than one spacing, and float32 forms it with some roundings more
        spacing = torch.finfo(formed.dtype).eps + 16 * torch.finfo(torch.float32).eps
        scale = W0.double().abs() * (1 + (B.double().abs() @ A.double().abs()).reshape(W0.shape))
        assert bool(((formed.double() - exact).abs() <= spacing * scale + 1e-7).all())
    return result


@settings(max_examples=120)
@given(
    models(),
    st.lists(st.sampled_from([1, 0.5, -2]), min_size=1, max_size=2),
    st.sampled_from([None, None, *FLOATS]),
    st.none() | st.integers(1, 400) | st.just(10**6),
    st.booleans(),
)
def test_a_merge_is_what_forming_in_memory_gives(tmp_path_factory, model, weights, dtype, limit, in_pieces):
    with pytest.MonkeyPatch.context() as patch:
        if in_pieces:  # tensors of some rows each time, and files of many blocks
            patch.setattr(merge_tensors, "_PART", 24)
            patch.setattr(heuristics, "block_entries", lambda device: 7)
            patch.setattr(output_file, "BLOCK", 64)
        check(tmp_path_factory, model, weights, dtype, limit)


def check(tmp_path_factory, model, weights, dtype, limit):
    files, factors = model
    root = tmp_path_factory.mktemp("merge")
    save_model(root / "base", files)
    tensors = {f"{m}.{'hira_embedding_' if e else 'hira_'}{x}": t for m, (A, B, e) in factors.items()
               for x, t in (("A", A), ("B", B))}  # fmt: skip
    save_adapter(root / "adapter", {name: tensor.contiguous() for name, tensor in tensors.items()})
    adapters = [root / "adapter"] * len(weights)
    report = merge_checkpoint(root / "base", adapters, root / "out", weights=weights, dtype=dtype, max_shard_size=limit)
    wanted = changed({n: t for held in files.values() for n, t in held.items()}, factors, weights, dtype)
    assert set(report.merged) == {f"{module}.weight" for module in factors}
    found, places = {}, {}
    written = bytes_of(root / "out")
    for path in (root / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert written[path.name] == save(held, {"format": "pt"})  # byte for byte what safetensors would write
        assert not held.keys() & found.keys()
        found |= held
        places |= dict.fromkeys(held, path.name)
        size = sum(tensor.nbytes for tensor in held.values())
        assert limit is None or size <= limit or len(held) == 1
        assert report.shards[path.name] == size
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []
    if limit is None:
        assert places == {name: file for file, held in files.items() for name in held}
    if set(places.values()) == {SINGLE}:
        assert INDEX not in written
    else:
        index = json.loads(written[INDEX])
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    shutil.rmtree(root)
