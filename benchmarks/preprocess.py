"""Text to training data: megabytes of text per second, against ``tokenizers`` and gigatoken, and the memory it takes.

    python benchmarks/preprocess.py            # about 3 minutes; --megabytes 20 --rounds 2 for a look

The text: Python sources of this machine (standard library and site-packages), deduplicated, in a seeded order. MB are
10^6 bytes of text in UTF-8, without JSON. In each round all of these run in turn; the figures are medians:

ours               ``tools/preprocess_data.py`` from its start to its exit, so to the synced .bin, .idx and manifest
tokenizers         ``encode_batch_fast`` alone, on all cores, of a sample in memory; nothing is read or written
gigatoken process  a process that only loads the tokenizer and calls ``encode_files`` on the JSONL; nothing is written
gigatoken call     only the call ``encode_batch`` on all texts in memory, in a process that has not encoded before

Memory is the most that all processes of ours have together (PSS, looked at every 20 ms), in runs that are not timed:
of this text, and of text that never repeats itself, for which gigatoken's cache grows.
"""

import argparse
import base64
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
SAMPLE_BYTES = 8_000_000  # for tokenizers
VOCAB = 32_000

GIGATOKEN_PROCESS = """
import sys, gigatoken
gigatoken.Tokenizer(sys.argv[1]).encode_files(gigatoken.JsonlFileSource([sys.argv[2]]))
"""
# Both of these print the seconds that the call took.
GIGATOKEN_CALL = """
import json, sys, time, awkward, gigatoken  # encode_batch would import awkward
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
tokenizer = gigatoken.Tokenizer(sys.argv[1])
started = time.perf_counter()
tokenizer.encode_batch(texts, parallel=True)
print(time.perf_counter() - started)
"""
TOKENIZERS_CALL = """
import json, sys, time, tokenizers
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
started = time.perf_counter()
tokenizer.encode_batch_fast(texts, add_special_tokens=False)
print(time.perf_counter() - started)
"""


def write_corpus(path: Path, n_bytes: int) -> int:
    """JSONL of Python sources; returns the bytes of text, at most about ``n_bytes``."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    files = sorted({file for root in roots for file in Path(root).rglob("*.py")})
    random.Random(0).shuffle(files)
    seen: set[bytes] = set()
    written = 0
    with open(path, "w", encoding="utf-8") as output:
        for file in files:
            data = file.read_bytes()
            digest = hashlib.sha256(data).digest()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text and digest not in seen and written < n_bytes:
                seen.add(digest)
                output.write(json.dumps({"text": text}) + "\n")
                written += len(data)
    return written


def write_noise(path: Path, n_bytes: int) -> None:
    """JSONL of text that does not repeat itself."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as output:
        for _ in range(n_bytes // 10_000):
            output.write(json.dumps({"text": base64.b85encode(rng.randbytes(8_000)).decode()}) + "\n")


def head(source: Path, path: Path, n_bytes: int) -> int:
    """The first documents of ``source`` with ``n_bytes`` of text or a little more; returns how many bytes."""
    taken = 0
    with open(source, encoding="utf-8") as lines, open(path, "w", encoding="utf-8") as output:
        for line in lines:
            if taken >= n_bytes:
                break
            output.write(line)
            taken += len(json.loads(line)["text"].encode())
    return taken


def ours(tokenizer: Path, corpus: Path, output: Path, workers: int) -> list[str]:
    tool = ROOT / "tools" / "preprocess_data.py"
    arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", workers]
    return [sys.executable, str(tool), *map(str, arguments)]


def seconds_of_process(command: list[str], threads: int) -> float:
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def seconds_of_call(code: str, tokenizer: Path, corpus: Path, threads: int) -> float:
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code, str(tokenizer), str(corpus)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def peak_mib(command: list[str]) -> float:
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(pss, [process, *process.children(recursive=True)])))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    return peak / 2**20


def pss(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="of text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, CORES}))
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: one of 32,000 tokens is trained)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(options, Path(name))


def measure(options: argparse.Namespace, folder: Path) -> None:
    corpus, sample, noise = (folder / f"{name}.jsonl" for name in ("corpus", "sample", "noise"))
    size = write_corpus(corpus, int(options.megabytes * 1e6))
    sample_size = head(corpus, sample, SAMPLE_BYTES)
    write_noise(noise, size)
    tokenizer = options.tokenizer or folder / "tokenizer.json"
    if options.tokenizer is None:
        head(corpus, folder / "training.jsonl", 2 * SAMPLE_BYTES)
        tool = ROOT / "tools" / "train_tokenizer.py"
        arguments = ["--input", folder / "training.jsonl", "--vocab-size", VOCAB, "--output", tokenizer]
        seconds_of_process([sys.executable, str(tool), *map(str, arguments)], CORES)
    print(
        f"{size / 1e6:.1f} MB of Python, {CORES} cores, {options.rounds} rounds; tokenizers: {sample_size / 1e6:.1f} MB"
    )

    rates: dict[tuple[str, int], list[float]] = {}  # (what, processes or threads) -> MB/s
    for _ in range(options.rounds):
        for n in options.workers:
            took = {
                "ours": seconds_of_process(ours(tokenizer, corpus, folder / "x", n), n),
                "gigatoken process": seconds_of_process(
                    [sys.executable, "-c", GIGATOKEN_PROCESS, str(tokenizer), str(corpus)], n
                ),
                "gigatoken call": seconds_of_call(GIGATOKEN_CALL, tokenizer, corpus, n),
            }
            for what, seconds in took.items():
                rates.setdefault((what, n), []).append(size / 1e6 / seconds)
        seconds = seconds_of_call(TOKENIZERS_CALL, tokenizer, sample, CORES)
        rates.setdefault(("tokenizers", CORES), []).append(sample_size / 1e6 / seconds)

    print(f"\n{'':20}{'processes, threads':>20}{'MB/s':>9}{'lowest':>9}{'highest':>9}")
    for (what, n), values in sorted(rates.items()):
        print(f"{what:20}{n:20}{statistics.median(values):9.1f}{min(values):9.1f}{max(values):9.1f}")

    most = max(options.workers)
    peak = {
        "python": peak_mib(ours(tokenizer, corpus, folder / "x", most)),
        "noise": peak_mib(ours(tokenizer, noise, folder / "x", most)),
    }
    print(f"\nmost memory of {most} workers and their parent: {peak['python']:.0f} MiB, noise {peak['noise']:.0f} MiB")

    def median(what: str, n: int) -> float:
        return statistics.median(rates[what, n])

    def ratios(other: str) -> dict[int, float]:
        return {n: median("ours", n) / median(other, n) for n in options.workers}

    process, call = ratios("gigatoken process"), ratios("gigatoken call")
    best = max(options.workers, key=lambda n: median("ours", n))
    print(f"against gigatoken alone, as many threads as workers: {format_ratios(process)} of a whole process,")
    print(f"{format_ratios(call)} of the call alone")
    summary = {
        "mb_per_s": median("ours", best),
        "vs_tokenizers": median("ours", best) / median("tokenizers", CORES),
        "vs_gigatoken": max(process.values()),
        "vs_gigatoken_workers": max(process, key=process.get),
        "vs_gigatoken_call": max(call.values()),
        "peak_mib": max(peak.values()),
        "peak_python_mib": peak["python"],
        "peak_noise_mib": peak["noise"],
        "text_mb": size / 1e6,
        "rounds": options.rounds,
        "cores": CORES,
        **{f"{what} {n}".replace(" ", "_"): median(what, n) for what, n in rates},
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in summary.items()}))


def format_ratios(values: dict[int, float]) -> str:
    return ", ".join(f"{value:.2f} with {n}" for n, value in values.items())


if __name__ == "__main__":
    main()
