"""Decoding: plain and self-speculative here, against transformers' ``generate`` on the exported model.

    python benchmarks/decode.py runs/demo --text data/demo/validation.jsonl          # some 10 minutes

All sides greedy, fp32, the same prompts (held-out code) and threads, in turn; tokens per second with the prompt's
own pass. Prompts whose plain completion repeats more than 30 % of its 4-grams are left out: loops flatter drafts.

bound   what drafts could gain at most: tokens per forward pass over the cost of a drafting forward in plain ones; both
        costs are of the model's products alone, without choosing, comparing and bookkeeping.
forced  on the held-out text itself: how often head k's likeliest token is that which head 1 finds k - 1 tokens later,
        heads 2 to k all right (that bounds a chain), in windows of the context.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from megamtp.convert.export import export
from megamtp.data.preprocess.documents import iterate_documents
from megamtp.errors import UserError, exits_cleanly
from megamtp.files import write_atomic
from megamtp.inference.decoder import Decoder
from megamtp.inference.generate import generate
from megamtp.inference.load import LoadedModel, load_decoder, load_model
from megamtp.inference.native.decoder import NativeDecoder
from megamtp.inference.tree import Tree

PROMPT, REPEATED = 64, 0.3  # tokens, largest share of repeated 4-grams
CHAINS, TREES = [(1,), (1, 1), (1, 1, 1)], [(2, 1), (3, 2), (4,)]
BATCH = 8


def held_out_prompts(model: LoadedModel, text: Path, count: int, n_new: int) -> tuple[list[list[int]], int]:
    """Of ``count`` pieces, evenly spread, those whose greedy completion does not loop; and how many there were."""
    documents = [model.tokenizer.encode(document) for document, _ in iterate_documents([text])]
    stream = [document for document in documents if len(document) > 2 * PROMPT]
    places = [(i, start) for i, document in enumerate(stream) for start in range(0, len(document) - PROMPT, PROMPT)]
    chosen = places[:: max(1, len(places) // count)][:count]
    prompts = [stream[i][start : start + PROMPT] for i, start in chosen]
    completions = generate(model.decoder, prompts, n_new, draft_heads=0, batch_size=BATCH).completions
    return [p for p, c in zip(prompts, completions, strict=True) if repetition(c.tokens) <= REPEATED], len(prompts)


def repetition(tokens: list[int]) -> float:
    """Share of 4-grams that stood there before."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 1.0


def forced_acceptance(model: LoadedModel, text: Path, n_windows: int = 40) -> list[float]:
    """Of heads 2 ... n: how often they and all nearer ones say what head 1 says with the true text before it."""
    n, right, total = model.decoder.n_heads, None, 0
    for document, _ in iterate_documents([text]):
        ids = model.tokenizer.encode(document)
        for start in range(0, len(ids) - model.context, model.context):
            window = torch.tensor([ids[start : start + model.context]])
            with torch.inference_mode():
                best = model.decoder.all_heads(window).argmax(-1)  # (n, t)
            length = best.shape[1] - n + 1
            same = torch.stack([best[k, :length] == best[0, k : k + length] for k in range(1, n)]).cumprod(0).sum(1)
            right, total = same if right is None else right + same, total + length
            n_windows -= 1
            if not n_windows:
                break
        if not n_windows:
            break
    return (right / total).tolist()


def forward_costs(
    decoder: Decoder | NativeDecoder, accepted: dict[tuple[int, ...], int], n_rows: int, length: int, rounds: int = 40
) -> dict[tuple[int, ...], float]:
    """Median seconds of a forward pass, the model's products alone, with ``length`` positions before it.

    ``accepted``: how many positions a pass with these drafts accepts. By turns, as the machine's speed wanders.
    """
    trees = {widths: Tree(widths) for widths in accepted}
    caches = {w: decoder.new_cache(n_rows, length + tree.n_nodes, tree.n_heads) for w, tree in trees.items()}
    lengths, times = [length] * n_rows, {widths: [] for widths in accepted}
    with torch.inference_mode():
        for _ in range(rounds):
            for widths, tree in trees.items():
                tokens, counts = torch.zeros(n_rows, tree.n_nodes, dtype=torch.long), [accepted[widths]] * n_rows
                started = time.perf_counter()
                at = decoder.next_positions(lengths, tree.n_nodes, None if tree.is_chain else tree)
                z = decoder.trunk(tokens, at, caches[widths])
                decoder.head_1(z, at, caches[widths])
                if widths:
                    path = decoder.path_positions(lengths, counts)
                    decoder.draft(z[:, : counts[0]], path, counts, tree.n_heads, caches[widths])
                times[widths].append(time.perf_counter() - started)
    return {widths: statistics.median(values) for widths, values in times.items()}


class Transformers:
    """Stock ``generate`` on the exported model, one prompt after another (batch 1) or BATCH at once."""

    def __init__(self, folder: Path, n_new: int):
        from transformers import AutoModelForCausalLM

        self.n_new = n_new
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.plain_forward = self.model.forward
        self.compiled_forward = torch.compile(self.model.forward)

    def tokens_per_second(self, prompts: list[list[int]], batch_size: int, compiled: bool = False, **how) -> float:
        self.model.forward = self.compiled_forward if compiled else self.plain_forward
        started = time.perf_counter()
        for first in range(0, len(prompts), batch_size):
            ids = torch.tensor(prompts[first : first + batch_size])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.n_new,
                min_new_tokens=self.n_new,
                do_sample=False,
                pad_token_id=0,
                **how,
            )
            assert out.shape[1] == PROMPT + self.n_new
        return len(prompts) * self.n_new / (time.perf_counter() - started)


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each side ``rounds`` times, by turns, after one for warming up."""
    found = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            value = side()
            if number:
                found[name].append(value)
            print(f"  round {number} {name}: {value:,.1f}", file=sys.stderr, flush=True)
    return found


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run")
    parser.add_argument("--text", type=Path, required=True, help="JSONL of held-out documents")
    parser.add_argument("--candidates", type=int, default=120, help="prompts before those that loop are left out")
    parser.add_argument("--prompts", type=int, default=16, help="at most so many are measured")
    parser.add_argument("--new-tokens", type=int, default=64, help=f"after {PROMPT} of a prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    model = load_model(options.model, dtype="fp32", device="cpu")
    kept, n_candidates = held_out_prompts(model, options.text, options.candidates, options.new_tokens)
    if len(kept) < BATCH:
        raise UserError(f"{options.model}: {len(kept)} of {n_candidates} completions do not loop; train it longer")
    prompts = kept[: options.prompts // BATCH * BATCH]
    layers, heads = model.source.config.n_trunk_layers + 1, model.decoder.n_heads
    result = {
        "model": f"{layers} layers + {heads - 1} extra heads, dim {model.source.config.dim}",
        "backend": type(model.decoder).__name__,
        "threads": options.threads,
        "prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "left_out": n_candidates - len(kept),
        "candidates": n_candidates,
        "forced_acceptance": forced_acceptance(model, options.text),
    }
    widths = [w for w in CHAINS + TREES if len(w) < heads]
    statistics_of, sides = {}, {}

    def ours(tree: tuple[int, ...], batch_size: int) -> float:
        found = generate(model.decoder, prompts, options.new_tokens, tree=tree, batch_size=batch_size)
        statistics_of[tree] = found.statistics
        return found.tokens_per_second

    for batch_size in (1, BATCH):
        for tree in [(), *widths]:
            sides[f"{_name(tree)} b{batch_size}"] = lambda tree=tree, size=batch_size: ours(tree, size)
    in_torch = load_decoder(model.source, model.context, torch.float32, torch.device("cpu"))
    sides["plain in PyTorch b1"] = lambda: (
        generate(in_torch, prompts, options.new_tokens, draft_heads=0, batch_size=1).tokens_per_second
    )
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_transformers:
            export(Path(options.model), Path(folder) / "export", dtype=torch.float32)
            theirs = Transformers(Path(folder) / "export", options.new_tokens)
            few = prompts[: BATCH // 2]
            for name, how in {
                "dynamic": {},
                "static": {"cache_implementation": "static"},
                "compiled": {"cache_implementation": "static", "compiled": True},
                "prompt lookup": {"prompt_lookup_num_tokens": 4},
            }.items():
                sides[f"transformers {name} b1"] = lambda how=how: theirs.tokens_per_second(few, 1, **how)
            sides[f"transformers dynamic b{BATCH}"] = lambda: theirs.tokens_per_second(prompts, BATCH)
        rates = measure(sides, options.rounds)

    medians = {name: statistics.median(values) for name, values in rates.items()}
    result["tokens_per_s"] = {
        name: {"median": medians[name], "min": min(values), "max": max(values)} for name, values in rates.items()
    }
    rows = []
    for batch_size in (1, BATCH):
        plain = medians[f"plain b{batch_size}"]
        accepted = {(): 1} | {tree: round(statistics_of[tree].tokens_per_forward) for tree in widths}
        seconds = forward_costs(model.decoder, accepted, batch_size, PROMPT + options.new_tokens // 2)
        for tree in widths:
            counts = statistics_of[tree]
            cost = seconds[tree] / seconds[()]
            gain = medians[f"{_name(tree)} b{batch_size}"] / plain
            rows.append(
                {
                    "drafts": _name(tree),
                    "batch": batch_size,
                    "gain": gain,
                    "tokens_per_forward": counts.tokens_per_forward,
                    "forward_cost": cost,
                    "share_of_bound": gain / (counts.tokens_per_forward / cost),
                    "acceptance": counts.acceptance,
                }
            )
    result["drafts"] = rows
    best = {
        size: max((row for row in rows if row["batch"] == size), key=lambda row: row["gain"]) for size in (1, BATCH)
    }
    if not options.no_transformers:
        theirs_b1 = max(medians[f"transformers {name} b1"] for name in ("dynamic", "static", "compiled"))
        result["plain_vs_transformers_b1"] = medians["plain b1"] / theirs_b1
        result["plain_vs_transformers_b8"] = medians[f"plain b{BATCH}"] / medians[f"transformers dynamic b{BATCH}"]
    result["speculative_vs_plain_b1"] = best[1]["gain"]
    result["speculative_vs_plain_b8"] = best[BATCH]["gain"]
    result["tokens_per_forward"] = best[1]["tokens_per_forward"]
    result["share_of_bound"] = best[1]["share_of_bound"]
    result["best_b1"], result["best_b8"] = best[1]["drafts"], best[BATCH]["drafts"]
    result["bf16_completions_that_differ"] = bf16_differences(model, prompts, options.new_tokens)
    print(table(result))
    print(json.dumps(result))
    if options.output:
        write_atomic(options.output, (json.dumps(result, indent=1) + "\n").encode())


def bf16_differences(model: LoadedModel, prompts: list[list[int]], n_new: int) -> float:
    """Share of the completions that drafts change in bf16, where ties are common."""
    decoder = load_decoder(model.source, model.context, torch.bfloat16, torch.device("cpu"))
    plain = generate(decoder, prompts, n_new, draft_heads=0, batch_size=1).completions
    drafted = generate(decoder, prompts, n_new, batch_size=1).completions
    return sum(a.tokens != b.tokens for a, b in zip(plain, drafted, strict=True)) / len(prompts)


def _name(tree: tuple[int, ...]) -> str:
    if not tree:
        return "plain"
    return f"{len(tree)} heads" if set(tree) == {1} else f"tree {','.join(map(str, tree))}"


def table(result: dict) -> str:
    lines = [f"{result['model']}, {result['backend']}, {result['threads']} threads, {result['prompts']} prompts", ""]
    lines += [f"{'tokens/s':<28}{'median':>10}{'min':>10}{'max':>10}"]
    for name, value in result["tokens_per_s"].items():
        lines.append(f"{name:<28}" + "".join(f"{value[key]:>10,.0f}" for key in ("median", "min", "max")))
    lines += ["", f"{'drafts':<12}{'batch':>6}{'gain':>8}{'tokens/fwd':>12}{'cost':>8}{'of bound':>10}  accepted"]
    for row in result["drafts"]:
        accepted = " ".join(f"{share:.2f}" for share in row["acceptance"])
        lines.append(
            f"{row['drafts']:<12}{row['batch']:>6}{row['gain']:>8.2f}{row['tokens_per_forward']:>12.2f}"
            f"{row['forward_cost']:>8.2f}{row['share_of_bound']:>10.2f}  {accepted}"
        )
    forced = " ".join(f"{share:.2f}" for share in result["forced_acceptance"])
    lines += ["", f"accepted with the true text before it: {forced}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
