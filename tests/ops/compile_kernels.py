"""Compile every Triton kernel to machine code for GPUs that are not here: ``python -m tests.ops.compile_kernels``.

The interpreter runs a kernel's Python; this is what shows that the compiler takes it. A line a kernel: capability,
type, name, loads of 16 bytes or more, and, for capability 9.0, registers a thread and bytes spilled. A process of its
own, as the interpreter is asked for by an environment variable before Triton is imported.
"""

import os
import re
import subprocess
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megamtp.ops import cross_entropy_triton, elementwise_triton

CAPABILITIES = [80, 90, 100]  # A100, H100 and H200, B200
TYPES = ["*fp32", "*bf16"]


def kernels(kind: str):
    """(kernel, signature, constants) as the launchers call them, for tensors of ``kind``."""
    ce, elementwise = cross_entropy_triton, elementwise_triton
    row = {"logits": kind, "stride": "i32", "n_columns": "i32"}
    of_tokens = dict.fromkeys(["largest", "totals", "losses", "scales"], "*fp32")
    block = {"BLOCK": ce.LARGEST_BLOCK}
    for gradient in (True, False):
        whole = {"targets": "*i64", "scales": "*fp32", "losses": "*fp32", "hits": "*i1"}
        yield ce._whole, row | whole, block | {"GRADIENT": gradient}
    yield ce._slice_statistics, row | {"largest": "*fp32", "totals": "*fp32"}, block
    yield ce._slice_gradient, row | of_tokens | {"targets": "*i64"}, block
    pairs = dict.fromkeys(["n_pairs", "n_heads", "seq_len", "row_stride"], "i32")
    for back in (True, False):
        constants = {"HALF": 64, "BACK": back, "BLOCK": elementwise.BLOCK}
        yield elementwise._rotate, {"x": kind, "out": kind, "cos": "*fp32", "sin": "*fp32"} | pairs, constants
    block = {"BLOCK": elementwise.BLOCK}
    yield elementwise._swiglu_forward, dict.fromkeys(["gate", "up", "out"], kind) | {"n": "i32"}, block
    yield (
        elementwise._swiglu_backward,
        dict.fromkeys(["gate", "up", "dout", "dgate", "dup"], kind) | {"n": "i32"},
        block,
    )


def compiled(kernel, signature, constants, capability: int):
    """As for a launch with aligned tensors and sizes that are multiples of 16, which every shape of a model has."""
    names = [*kernel.arg_names]
    assert set(names) == {*signature, *constants}, (kernel, names)
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in signature},
    )
    is_elementwise = kernel.__module__ == elementwise_triton.__name__
    warps = 4 if is_elementwise else cross_entropy_triton.launch_options(32000)["num_warps"]
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def registers_and_spills(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread, and bytes that did not find one, as NVIDIA's assembler counts them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{capability}a", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", told)[1]), int(re.search(r"(\d+) bytes spill stores", told)[1])


def main() -> None:
    for capability in CAPABILITIES:
        for kind in TYPES:
            for kernel, signature, constants in kernels(kind):
                ptx = compiled(kernel, signature, constants, capability).asm["ptx"]
                line = [capability, kind, kernel.__name__, len(re.findall(r"ld\.global\S*\.v[48]\.", ptx))]
                if capability == 90:
                    line += registers_and_spills(ptx, capability)
                print(*line)


if __name__ == "__main__":
    main()
