"""How evenly the layers are cut into pipeline stages: ours, DeepSpeed's two methods, and the true optimum.

    python benchmarks/pipeline_balance.py            # a few seconds

Each figure is the slowest rank's cost over the ideal, total / PP. The cost of a layer is its training FLOPs per token
at 4096 tokens (``layer_train_flops``) for all of them; ``parameters`` and ``uniform`` are DeepSpeed's own partition
functions over the same list of layers. Under DualPipeV a rank holds two of the 2 x PP stages, r and 2 PP - 1 - r.
Where the heads alone cost more than the ideal no cut reaches 1: the optimum says what can be had.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.runtime.utils import partition_balanced, partition_uniform

from megamtp.model.cost import layer_parameters, layer_train_flops
from megamtp.model.cut import choose_cut
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.groups import ParallelConfig

SIZES = {"7B": (4096, 32, 32, 11008), "13B": (5120, 40, 40, 13824)}  # dim, layers, heads, feed-forward
SEQ_LEN, RECOMPUTE, HEADS_MODE = 4096, "none", "sequential"
ENUMERATE = 20_000  # cuts that are still all tried
METHODS = ("ours", "parameters", "uniform")


def slowest(costs: list[float], boundaries: list[int], pairs: bool) -> float:
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(boundaries)]
    return max(a + b for a, b in zip(stages, reversed(stages), strict=True)) if pairs else max(stages)


def optimum(costs: list[float], n_ranks: int, pairs: bool) -> float:
    """The slowest rank of the best cut, without the dynamic programming that ``choose_cut`` uses.

    All trunk blocks cost the same, so that only how many of them a rank holds matters. The ranks with the embedding
    and the heads are enumerated; the blocks that they leave are best spread evenly over the others, which hold
    at least one (a pair of stages: two) each.
    """
    embedding, block, heads = costs[0], costs[1], costs[-1]
    assert costs[1:-1] == [block] * (len(costs) - 2)
    n_blocks, per_rank = len(costs) - 2, 2 if pairs else 1
    if pairs:
        ends = ((embedding + heads + block * held, held) for held in range(n_blocks + 1))
        others = n_ranks - 1
    else:
        ends = (
            (max(embedding + block * first, heads + block * last), first + last)
            for first in range(n_blocks + 1)
            for last in range(n_blocks + 1 - first)
        )
        others = n_ranks - 2
    best = math.inf
    for end, held in ends:
        left = n_blocks - held
        if left >= per_rank * others and (others or not left):
            best = min(best, max(end, block * math.ceil(left / others) if others else 0))
    return best


def enumerated_optimum(costs: list[float], n_stages: int, pairs: bool) -> float | None:
    """The same by trying every cut; None where they are too many."""
    if math.comb(len(costs) - 1, n_stages - 1) > ENUMERATE:
        return None
    cuts = itertools.combinations(range(1, len(costs)), n_stages - 1)
    return min(slowest(costs, [0, *inner, len(costs)], pairs) for inner in cuts)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'size':5}{'V':>7}{'n':>3}{'PP':>4}  {'schedule':10}{'optimum':>9}", end="")
    print("".join(f"{method:>12}" for method in METHODS) + "  ours: layers per stage")
    rows, seconds, enumerated = [], [], 0
    cases = itertools.product(SIZES.items(), (32000, 128000), (1, 4, 8), (2, 4, 8), ("1f1b", "dualpipev"))
    for (size, (dim, layers, n_heads, ffn)), vocab, n, pp, schedule in cases:
        config = ModelConfig(
            vocab_size=vocab, dim=dim, n_layers=layers, n_heads=n_heads, ffn_dim=ffn, n_future_tokens=n
        )
        parallel = ParallelConfig(pipeline=pp, schedule=schedule)
        pairs = schedule == "dualpipev"
        costs = layer_train_flops(config, SEQ_LEN, RECOMPUTE, HEADS_MODE)
        started = time.perf_counter()
        ours = choose_cut(config, HEADS_MODE, parallel, SEQ_LEN, RECOMPUTE)
        seconds.append(time.perf_counter() - started)
        cuts = {
            "ours": ours,
            "parameters": [int(i) for i in partition_balanced(layer_parameters(config), parallel.stages)],
            "uniform": partition_uniform(len(costs), parallel.stages),
        }
        ideal = sum(costs) / pp
        row = {method: slowest(costs, cut, pairs) / ideal for method, cut in cuts.items()}
        row["heads"] = costs[-1] / ideal
        row["optimum"] = optimum(costs, pp, pairs) / ideal
        every = enumerated_optimum(costs, parallel.stages, pairs)
        if every is not None:
            enumerated += 1
            assert math.isclose(every / ideal, row["optimum"], rel_tol=1e-9), "the two optima differ"
        rows.append(row)
        print(f"{size:5}{vocab:7}{n:3}{pp:4}  {schedule:10}{row['optimum']:9.3f}", end="")
        print("".join(f"{row[method]:12.3f}" for method in METHODS), end="  ")
        print(" ".join(str(b - a) for a, b in itertools.pairwise(ours)), flush=True)

    summary = {
        "never_worse": all(row["ours"] <= min(row["parameters"], row["uniform"]) * (1 + 1e-9) for row in rows),
        "equals_optimum": all(math.isclose(row["ours"], row["optimum"], rel_tol=1e-9) for row in rows),
        "worst_ratio": max(row["ours"] for row in rows),
        "worst_ratio_where_heads_fit": max(row["ours"] for row in rows if row["heads"] <= 1),
        "cases": len(rows),
        "cases_enumerated": enumerated,
        "slowest_cut_seconds": max(seconds),
    }
    for method in METHODS:
        summary[f"median_{method}"] = statistics.median(row[method] for row in rows)
    for method in METHODS[1:]:
        summary[f"worst_{method}_over_ours"] = max(row[method] / row["ours"] for row in rows)
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in summary.items()}))


if __name__ == "__main__":
    main()
