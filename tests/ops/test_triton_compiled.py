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

# Bytes of shared memory that a block may have, by NVIDIA's compute capability or AMD's architecture.
SHARED = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
# The instructions that multiply tiles, and those among them that round float32.
MATRIX = {"ptx": ("mma.sync", "wgmma", "tcgen05.mma"), "amdgcn": ("v_mfma_f32_16x16x16", "v_mfma_f32_32x32x8")}
ROUNDED = {"ptx": "tf32", "amdgcn": "xf32"}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each kernel takes, for every target: none is left out, so a triton that lacks one fails here."""
    pytest.importorskip("triton", reason="triton is not installed, so there is nothing to compile")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(params=SHARED)
def compiled(request, reports):
    return request.param, [report for report in reports if report["target"] == request.param]


def test_every_kernel_fits(compiled):
    target, kernels = compiled
    names = {"form_kernel", "factor_gradients_kernel", "decode_kernel", "sum_kernel"}
    assert {kernel["name"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[target], kernel


def test_halves_are_multiplied_on_tensor_cores(compiled):
    _, kernels = compiled
    for kernel in kernels:
        halves = kernel["name"] != "sum_kernel" and kernel["dtype"] != "torch.float32"
        assert kernel["tensor cores"] == halves, kernel


def test_products_of_float32_are_exact(compiled):
    """No tf32 or xf32 anywhere."""
    assert not [kernel for kernel in compiled[1] if kernel["rounded"]]


class Compiler:
    """Stands in for a kernel: compiles it for the arguments of a launch, as a launch would."""

    def __init__(self, kernel, target):
        self.kernel, self.target = kernel, target

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        import triton
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
        result = triton.compile(source, target=self.target, options=options)
        assembly = "ptx" if "ptx" in result.asm else "amdgcn"
        code = result.asm[assembly]
        report = {
            "target": str(self.target.arch),
            "name": self.kernel.__name__,
            "dtype": next((str(values[name].dtype) for name in ("x", "G", "out") if name in values), ""),
            "shared": result.metadata.shared,
            "tensor cores": any(name in code for name in MATRIX[assembly]),
            "rounded": ROUNDED[assembly] in code,
        }
        print(json.dumps(report))


def compile_all():
    """Launch every kernel for every target, with a half and with float32; for one with other ranks and sizes too."""
    from triton.backends.compiler import GPUTarget

    from hira.ops.triton import arithmetic, decode, factor_gradients, form, tiles

    kernels = [
        (module, name, kernel)
        for module in (arithmetic, *(sys.modules[function.__module__] for function in (form, factor_gradients, decode)))
        for name, kernel in list(vars(module).items())
        if name.endswith("_kernel")
    ]
    for name, shared in SHARED.items():
        target = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)
        for module, attribute, kernel in kernels:
            setattr(module, attribute, Compiler(kernel, target))
        tiles.spacious = lambda tensor, shared=shared: shared > 160 << 10
        compile_cases([(torch.bfloat16, 64, torch.float32), (torch.float32, 33, torch.float32)])
        if name == "90":
            compile_cases([(torch.float16, 130, torch.bfloat16)])
            compile_edges()


def compile_cases(cases):
    from hira.ops.triton import decode, factor_gradients, form

    T, out, into = 4, 256, 512
    for dtype, r, adapter in cases:
        x, dy, W0 = torch.ones(T, into).to(dtype), torch.ones(T, out).to(dtype), torch.ones(out, into).to(dtype)
        A, B = torch.ones(r, into).to(adapter), torch.ones(out, r).to(adapter)
        noise = None if dtype == torch.float32 else (torch.ones(out).short(), torch.ones(into).short())
        form(W0, A, B, dtype, noise=noise)
        form(W0, A, B, dtype, lora_r=r // 2, noise=noise)
        factor_gradients(dy, x, W0, A, B)
        decode(x, W0, A, B)


def compile_edges():
    """Sizes of 1, other layouts, and a weight of another dtype than x."""
    from hira.ops.triton import decode, factor_gradients, form

    one = torch.ones(1, 1)
    form(one, one.double(), one, torch.bfloat16, update_only=True)
    factor_gradients(one, one, one.t(), one, one)
    decode(one, one, one, one, one[0])
    turned = torch.ones(512, 256, dtype=torch.bfloat16).t()
    form(turned, torch.ones(512, 16).t(), torch.ones(16, 256).t(), torch.float16)
    decode(torch.ones(4, 512).half(), torch.ones(256, 512), torch.ones(16, 512), torch.ones(256, 16), torch.ones(256))


if __name__ == "__main__":
    compile_all()
