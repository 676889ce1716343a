"""Triton's compiler and NVIDIA's assembler take every kernel, for GPUs that need not be here."""

import os
import subprocess
import sys


def test_every_kernel_compiles_for_every_gpu():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compile_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3 * 2 * 8 and {line[0] for line in lines} == {"80", "90", "100"}
    for line in lines:
        assert int(line[3]) > 0, f"{line}: loads its data in pieces of less than 16 bytes"
    on_hopper = [line for line in lines if line[0] == "90"]
    assert len(on_hopper) == 16
    for *what, registers, spilled in on_hopper:
        assert int(registers) <= 64 and int(spilled) == 0, f"{what}: {registers} registers, {spilled} bytes spilled"
