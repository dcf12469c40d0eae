"""The kernels compile for real GPUs, without one: the interpreter accepts what the compiler does not.

Run as a script, in a process where Triton compiles, this file calls the functions of `hira.ops.triton` on CPU tensors
with a stand-in for each kernel, which compiles what would be launched and prints what it takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

# Bytes of shared memory that a block may have, by compute capability.
SHARED = {89: 99 << 10, 90: 227 << 10}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.fixture(scope="module", params=sorted(SHARED))
def compiled(request, tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed, so there is nothing to compile")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__, str(request.param)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return request.param, [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_fits(compiled):
    capability, kernels = compiled
    names = {"form_kernel", "factor_gradients_kernel", "decode_kernel", "sum_kernel"}
    assert {kernel["name"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel


def test_halves_are_multiplied_on_tensor_cores(compiled):
    _, kernels = compiled
    for kernel in kernels:
        halves = kernel["name"] != "sum_kernel" and kernel["dtype"] != "torch.float32"
        assert kernel["tensor cores"] == halves, kernel


def test_products_of_float32_are_exact(compiled):
    """No tf32 anywhere."""
    assert not [kernel for kernel in compiled[1] if kernel["tf32"]]


class Compiler:
    """Stands in for a kernel: compiles it for the arguments of a launch, as a launch would."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: options.pop(n) for n in names if n in options}
        constants = set(names[len(args) :])
        signature, constexprs, attributes = {}, {}, {}
        for position, (name, value) in enumerate(values.items()):
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], constexprs[(position,)] = "constexpr", value
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = POINTERS[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
        result = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        ptx = result.asm["ptx"]
        report = {
            "name": self.kernel.__name__,
            "dtype": next((str(values[name].dtype) for name in ("x", "G", "out") if name in values), ""),
            "shared": result.metadata.shared,
            "tensor cores": "mma.sync" in ptx or "wgmma" in ptx,
            "tf32": "tf32" in ptx,
        }
        print(json.dumps(report))


def compile_all(capability):
    """Launch every kernel with halves and with float32, small ranks and large, sizes of 1 too."""
    from hira.ops.triton import arithmetic, decode, factor_gradients, form, tiles

    for module in (arithmetic, *(sys.modules[function.__module__] for function in (form, factor_gradients, decode))):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiler(getattr(module, name), capability))
    tiles.spacious = lambda tensor: SHARED[capability] > 160 << 10

    T, out, into = 4, 256, 512
    for dtype, r, adapter in (
        (torch.bfloat16, 32, torch.float32),
        (torch.float16, 130, torch.bfloat16),
        (torch.float32, 33, torch.float32),
    ):
        x, dy, W0 = torch.ones(T, into).to(dtype), torch.ones(T, out).to(dtype), torch.ones(out, into).to(dtype)
        A, B = torch.ones(r, into).to(adapter), torch.ones(out, r).to(adapter)
        noise = None if dtype == torch.float32 else (torch.ones(out).short(), torch.ones(into).short())
        form(W0, A, B, dtype, noise=noise)
        factor_gradients(dy, x, W0, A, B)
        decode(x, W0, A, B)
        decode(x, W0.float(), A, B, torch.ones(out))
    one = torch.ones(1, 1)
    form(one, one.double(), one, torch.bfloat16, update_only=True)
    factor_gradients(one, one, one.t(), one, one)
    decode(one, one, one, one, one[0])
    turned = torch.ones(into, out, dtype=torch.bfloat16).t()
    form(turned, torch.ones(into, 16).t(), torch.ones(16, out).t(), torch.float16)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
