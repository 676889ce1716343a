"""Text (JSONL, Parquet) -> ``.bin/.idx`` training data.

python tools/preprocess_data.py --input corpus/ more.jsonl.gz --tokenizer tokenizer.json --output data/corpus
mpirun -n 4 python tools/preprocess_data.py ...      # the same files, made by four nodes
python tools/preprocess_data.py ... --shard 3/8      # one of eight jobs; tools/merge_data.py joins them
"""

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

from megamtp.data.manifest import Manifest
from megamtp.data.preprocess.encode import preprocess, require_documents
from megamtp.errors import UserError, exits_cleanly
from megamtp.parallel.environment import LaunchEnvironment, launch_environment, mpi_ranks


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet; folders; globs"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="a tokenizer.json, a Hugging Face tokenizer's folder, a SentencePiece .model, or the word bytes",
    )
    parser.add_argument("--output", required=True, help="path of the result without .bin or .idx")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: %(default)s)")
    parser.add_argument("--eod", help="token that ends a document (default: the tokenizer's own)")
    parser.add_argument("--workers", type=_positive, help="processes (default: one per usable core)")
    parser.add_argument(
        "--on-error", choices=["fail", "skip"], default="fail", help="what a malformed document does (default: fail)"
    )
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="only the I-th (0 ... N-1) of N parts of the input")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit cleans up as a Ctrl-C does

    environment = launch_environment()
    if environment.world_size == 1:
        manifest = preprocess_shard(options, options.shard or (0, 1))
    else:
        manifest = preprocess_by_ranks(options, environment)
    if manifest is None:
        return
    if manifest.skipped:
        print(f"{manifest.skipped:,} malformed documents skipped", file=sys.stderr)
    print(json.dumps(dataclasses.asdict(manifest)))


def preprocess_shard(options: argparse.Namespace, shard: tuple[int, int], progress: bool = True) -> Manifest:
    return preprocess(
        options.input,
        options.tokenizer,
        shard_prefix(options.output, *shard),
        options.text_key,
        options.eod,
        workers=options.workers,
        on_error=options.on_error,
        shard=shard,
        progress=progress,
    )


def preprocess_by_ranks(options: argparse.Namespace, environment: LaunchEnvironment) -> Manifest | None:
    """Every rank makes a shard, rank 0 joins them and has the whole's manifest."""
    if options.shard:
        raise UserError(f"--shard: {environment.launcher} shares out the input itself; leave it out")
    with mpi_ranks(environment, "give each task its own --shard I/N, and join them with tools/merge_data.py") as world:
        rank, count = environment[:2]
        part = preprocess_shard(options, (rank, count), progress=rank == 0)
        documents, skipped = (sum(world.allgather(n)) for n in (part.documents, part.skipped))
        require_documents(documents, skipped, options.input)
        if rank:
            return None
        from megamtp.data.merge import merge

        return merge([shard_prefix(options.output, i, count) for i in range(count)], options.output, True, remove=True)


def shard_prefix(output: str, index: int, count: int) -> Path:
    return Path(output if count == 1 else f"{output}-{index:05d}-of-{count:05d}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(index), int(count)


if __name__ == "__main__":
    main()
