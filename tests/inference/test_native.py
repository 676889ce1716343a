"""Compiled blocks: the same bits whatever is computed beside, on every kind of processor, and how they are built."""

import itertools
import os

import pytest
import torch

from megamtp.inference.native import build
from megamtp.inference.native.decoder import NativeDecoder
from megamtp.inference.tree import Tree
from tests.inference.models import decoder_of, trained_model
from tests.inference.test_decoder import model_of, random_tokens
from tests.inference.test_speculative import HOW, tokens_of


@pytest.fixture(scope="module")
def plain():
    return tokens_of(native(trained_model()), batch_size=1, draft_heads=0)


def native(model) -> NativeDecoder:
    return decoder_of(model, torch.float32, kind=NativeDecoder)


def test_it_generates_what_pytorch_generates_in_fp64(plain):
    """Equal, but for a prompt or two in which two tokens nearly tie."""
    exact = tokens_of(decoder_of(trained_model()), batch_size=8, draft_heads=0)
    assert sum(a != b for a, b in zip(plain, exact, strict=True)) <= 2


@pytest.mark.parametrize(("batch_size", "how"), itertools.product((1, 4, 8), [{"draft_heads": 0}, *HOW]), ids=str)
def test_drafts_and_batches_change_no_token_in_fp32(plain, how, batch_size):
    assert tokens_of(native(trained_model()), batch_size=batch_size, **how) == plain


@torch.inference_mode()
@pytest.mark.parametrize("n_kv_heads", [None, 1])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_position_has_the_same_bits_in_any_company(n_kv_heads, n_threads):
    """Logits of 60 tokens: as a prompt, one by one, three by three, and each in the middle of a batch and a tree.

    With two threads a model wide enough for them to share the work of a prompt and of three positions, not of one.
    """
    model = model_of(n_kv_heads, **({"dim": 256, "ffn_dim": 1024} if n_threads == 2 else {}))
    decoder, tokens = native(model), random_tokens(60)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        expected = decoder.all_heads(tokens[None])[0]
        for n_new in (1, 3):
            cache, found = decoder.new_cache(1, 68, 0), []
            for start in range(0, 60, n_new):
                at = decoder.next_positions([start], n_new)
                z = decoder.trunk(tokens[None, start : start + n_new], at, cache)
                found.append(decoder.head_1(z, at, cache)[0])
            assert torch.equal(torch.cat(found), expected)
        tree = Tree((2, 1))  # nodes 0; 1, 2; 3, 4: the path 0, 2, 4 is the text's
        cache, lengths = decoder.new_cache(5, 68, 0), [0, 7, 33, 20, 56]
        for row, length in enumerate(lengths[1:], 1):
            at = decoder.prompt_positions(row, length)
            decoder.head_1(decoder.trunk(tokens[None, :length], at, cache), at, cache)
        nodes = torch.stack([tokens[[n, 0, n + 1, 0, n + 2]] for n in lengths])
        at = decoder.next_positions(lengths, tree.n_nodes, tree)
        logits = decoder.head_1(decoder.trunk(nodes, at, cache), at, cache)
        for row, length in enumerate(lengths):
            assert torch.equal(logits[row, [0, 2, 4]], expected[length : length + 3])
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_branch_that_is_taken_is_moved_to_its_place():
    decoder, tokens = native(model_of()), random_tokens(40)
    cache = decoder.new_cache(2, 70, 0)
    for row in (0, 1):
        at = decoder.prompt_positions(row, 40)
        decoder.trunk(tokens[None].flip(1) if row else tokens[None], at, cache)
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.move(range(0, 2), 1, [29, 31, 33], 29)  # slots 31 and 33 to 30 and 31, in trunk layers 0 and 1 alone

    def slot(cache_keys, cache_values, layer, row, number):
        return cache_keys[layer, row, :, number // 32, :, number % 32], cache_values[layer, row, :, :, number]

    for layer, row, number in itertools.product(range(3), range(2), range(40)):
        source = {30: 31, 31: 33}.get(number, number) if layer < 2 and row == 1 else number
        for moved, original in zip(
            slot(cache.keys, cache.values, layer, row, number), slot(keys, values, layer, row, source), strict=True
        ):
            assert torch.equal(moved, original), (layer, row, number)
    cache.move_row(1, 0, 40)
    assert torch.equal(cache.keys[:, 0, :, 0], cache.keys[:, 1, :, 0])
    assert torch.equal(cache.values[:, 0, :, :, :40], cache.values[:, 1, :, :, :40])


@torch.inference_mode()
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_kind_of_processor_computes_the_same(capability, monkeypatch):
    """Those that this one can stand in for."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(capability) > order.index(here):
        pytest.skip(f"this processor has {here}")
    model, tokens = model_of(), random_tokens(1, 40)
    build.library.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    try:
        assert (native(model).all_heads(tokens) - model(tokens)[:, 0]).abs().max() < 1e-5
    finally:
        build.library.cache_clear()


@torch.inference_mode()
def test_extreme_scores_and_gates():
    """Weights so large that softmax and SiLU saturate: as PyTorch has it, and finite."""
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 30
    tokens = random_tokens(1, 12)
    logits, wanted = native(model).all_heads(tokens), model(tokens)[:, 0]
    assert logits.isfinite().all()
    assert (logits - wanted).norm() / wanted.norm() < 1e-3


# --- building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder; nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "megamtp"
    build.library.cache_clear()


def test_it_is_compiled_once(fresh, monkeypatch):
    build.library()
    (file,) = fresh.iterdir()
    changed = file.stat().st_mtime_ns
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.library()
    assert file.suffix == ".so" and file.stat().st_mtime_ns == changed


WRECK = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo wreck > "$2"; shift; done'


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no C compiler"),
        ("[ $1 = --version ] || { echo 'blocks.c:1: no OpenMP' >&2; exit 1; }", "blocks.c:1: no OpenMP"),
        ("exit 1", "failed"),
        (WRECK, "does not load"),
        ("sleep 9", "no answer in 1 seconds"),
    ],
)
def test_what_cannot_be_built_is_told(script, message, fresh, tmp_path, monkeypatch):
    path = tmp_path / "compiler"
    if script:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("CC", f"{path} -g")
    monkeypatch.setattr(build, "COMPILER_SECONDS", 1)
    with pytest.raises(build.CannotBuild, match=message):
        build.library()
    assert script == WRECK or not fresh.exists() or not os.listdir(fresh)


def test_a_cache_folder_that_cannot_be_written_is_told(fresh, tmp_path, monkeypatch):
    (tmp_path / "megamtp").write_text("a file")
    with pytest.raises(build.CannotBuild, match=f"{fresh}: File exists"):
        build.library()
