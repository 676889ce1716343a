"""Which backend is chosen where, what is refused, and what the table says would be gained."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megamtp.errors import UserError
from megamtp.ops.choice import PACKAGES, PORTABLE, Machine, OpsConfig, Use, choice_table, choose, this_machine

NOTHING = frozenset()
EVERYTHING = frozenset(PACKAGES)
CPU = Machine("cpu", "CPU", (0, 0), EVERYTHING)
HOPPER = Machine("cuda", "NVIDIA H100", (9, 0), NOTHING)
USE = Use(half=True, documents=False, split_vocabulary=False)


def chosen(machine: Machine, use: Use = USE, **asked) -> OpsConfig:
    return choose(OpsConfig(**asked), machine, use)[0]


def test_a_cpu_gets_what_is_portable_whatever_is_installed():
    ops, choices = choose(OpsConfig(), CPU, USE)
    assert ops == OpsConfig(**PORTABLE)
    assert choice_table(CPU, choices).splitlines() == [
        "kernels on CPU:",
        "  attention      sdpa",
        "  norm           torch",
        "  elementwise    torch",
        "  cross_entropy  torch",
        "  adamw          torch",
    ]


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((8, 0), EVERYTHING, "flash2"),
        ((9, 0), EVERYTHING, "flash3"),
        ((10, 0), EVERYTHING, "flash4"),
        ((9, 0), {"flash-attn 2"}, "flash2"),
        ((7, 0), EVERYTHING, "sdpa"),
        ((9, 0), NOTHING, "sdpa"),
    ],
)
def test_attention_by_what_is_there(capability, installed, expected):
    machine = Machine("cuda", "some GPU", capability, frozenset(installed))
    assert chosen(machine).attention == expected
    assert chosen(machine, replace(USE, half=False)).attention == "sdpa"  # flash-attn has no fp32


def test_documents_without_flash_attn():
    with_triton = replace(HOPPER, installed=frozenset({"triton"}))
    assert chosen(with_triton, replace(USE, documents=True)).attention == "flex"
    assert chosen(with_triton).attention == "sdpa"
    assert chosen(HOPPER, replace(USE, documents=True)).attention == "sdpa"


def test_triton_where_it_is_installed():
    ops = chosen(replace(HOPPER, installed=frozenset({"triton"})))
    assert (ops.cross_entropy, ops.elementwise) == ("triton", "triton")
    # A compiled block fuses what lies in it.
    compiled = chosen(replace(HOPPER, installed=frozenset({"triton"})), compile=True)
    assert (compiled.cross_entropy, compiled.elementwise) == ("triton", "torch")


def test_what_an_installation_would_gain_is_told_once_each():
    _, choices = choose(OpsConfig(), HOPPER, replace(USE, documents=True))
    table = choice_table(HOPPER, choices)
    assert "flash-attn 3 is not installed: " in table and "flash-attn 2" not in table
    assert table.count("triton is not installed: ") == 3
    _, choices = choose(OpsConfig(), replace(HOPPER, installed=EVERYTHING), USE)
    assert "not installed" not in choice_table(HOPPER, choices)


def test_what_is_asked_for_is_kept_and_marked():
    ops, choices = choose(OpsConfig(attention="reference", norm="apex"), replace(HOPPER, installed=EVERYTHING), USE)
    assert (ops.attention, ops.norm) == ("reference", "apex")
    assert "reference (asked for)" in choice_table(HOPPER, choices)


@pytest.mark.parametrize(
    ("machine", "use", "asked", "message"),
    [
        (HOPPER, USE, {"norm": "compiled"}, "compiled: is torch.compile's work, which needs triton; use torch"),
        (
            replace(CPU, installed=NOTHING),
            USE,
            {"compile": True},
            "ops.compile: is torch.compile's work, which needs a C",
        ),
        (CPU, USE, {"cross_entropy": "triton"}, "ops.cross_entropy is triton: needs a GPU; use torch, or leave it out"),
        (HOPPER, USE, {"attention": "flash2"}, "flash2: flash-attn 2 is not installed; use cudnn or sdpa or reference"),
        (replace(HOPPER, installed=EVERYTHING, capability=(8, 0)), USE, {"attention": "flash3"}, "whose compute"),
        (replace(HOPPER, installed=EVERYTHING), replace(USE, half=False), {"attention": "flash3"}, "bf16 alone"),
        (
            replace(HOPPER, installed=EVERYTHING),
            replace(USE, split_vocabulary=True),
            {"cross_entropy": "liger"},
            "liger: needs the whole vocabulary on each rank, so parallel.tensor 1; use triton or torch",
        ),
        (replace(HOPPER, installed=EVERYTHING), USE, {"attention": "flash4", "compile": True}, "leave ops.compile out"),
        (
            replace(HOPPER, installed=EVERYTHING),
            replace(USE, offload_optimizer=True),
            {"adamw": "apex"},
            "offload_optimizer has no states; use torch",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(machine, use, asked, message):
    with pytest.raises(UserError) as refused:
        choose(OpsConfig(**asked), machine, use)
    assert message in str(refused.value)


def test_looking_imports_nothing():
    """In a process of its own: after choosing, none of the optional packages has been imported."""
    code = """
import sys, torch
from megamtp.ops.choice import OpsConfig, Use, choose, this_machine
choose(OpsConfig(), this_machine(torch.device("cpu")), Use(False, False, False))
found = {"triton", "flash_attn", "flash_attn_interface", "liger_kernel", "apex", "amp_C"} & set(sys.modules)
print(sorted(found - BEFORE))
"""
    code = "import sys, torch\nBEFORE = set(sys.modules)\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_this_machine():
    machine = this_machine(torch.device("cpu"))
    assert (machine.device, machine.capability) == ("cpu", (0, 0))
    assert {"triton", "liger-kernel"} <= machine.installed <= EVERYTHING
