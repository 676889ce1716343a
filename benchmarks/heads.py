"""The three modes of the heads: time and peak memory of a training step at n = 4, on this machine's CPU.

    python benchmarks/heads.py            # about 8 minutes

The shape, the way of measuring and the meaning of memory are those of ``train_step.py``.
"""

import argparse
import json
import statistics

from train_step import MICRO_BATCH, SEQ, Process, measure_memory, measure_times, spread

MODES = {"sequential": "ours", "joint": "ours-joint", "naive": "ours-naive"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mode (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    options = parser.parse_args()
    results = {dtype: measure(dtype, options.rounds) for dtype in options.dtypes}
    print(json.dumps(results))


def measure(dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    times = measure_times({mode: Process(side, 4, dtype, "kept") for mode, side in MODES.items()}, rounds)
    print(f"\n{dtype}, n = 4, {SEQ * MICRO_BATCH} tokens a step")
    rows = {}
    for mode, side in MODES.items():
        size = measure_memory(side=side, n=4, dtype=dtype, allocator="kept", micro_batch=2 * MICRO_BATCH)
        slower = statistics.median(a / b for a, b in zip(times[mode], times["sequential"], strict=True))
        rows[mode] = {"time_over_sequential": round(slower, 3), "gib_at_twice_the_batch": round(size / 2**30, 2)}
        print(
            f"  {mode:10} {spread(times[mode])}  x {slower:.3f}   {size / 2**30:.2f} GiB at twice the batch", flush=True
        )
    return rows


if __name__ == "__main__":
    main()
