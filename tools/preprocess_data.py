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
from importlib.util import find_spec
from pathlib import Path

from megamtp.data.preprocess.encode import preprocess, require_documents
from megamtp.errors import UserError, exits_cleanly
from megamtp.parallel.environment import launch_environment, mpi_world


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
    if environment.world_size > 1 and options.shard:
        raise UserError(f"--shard: {environment.launcher} shares out the input itself; leave it out")
    if environment.world_size > 1 and not find_spec("mpi4py"):
        raise UserError("ranks need mpi4py to meet; pip install mpi4py, or give each task its own --shard I/N")
    index, count = options.shard or environment[:2]
    prefix = shard_prefix(options.output, index, count)
    manifest = preprocess(
        options.input,
        options.tokenizer,
        prefix,
        options.text_key,
        options.eod,
        workers=options.workers,
        on_error=options.on_error,
        shard=(index, count),
        progress=environment.rank == 0,
    )
    if environment.world_size > 1:
        shards = [shard_prefix(options.output, i, count) for i in range(count)]
        advice = f"join what is there: tools/merge_data.py --input {shards[0]} ... --output {options.output}"
        try:
            world = mpi_world(environment, advice)
        except ImportError as error:
            raise UserError(f"mpi4py: cannot be used ({' '.join(str(error).split())}); {advice}") from None
        documents, skipped = (sum(world.allgather(n)) for n in (manifest.documents, manifest.skipped))
        require_documents(documents, skipped, options.input)
        if environment.rank:
            return
        from megamtp.data.merge import merge

        manifest = merge(shards, options.output, progress=True, remove=True)
    if manifest.skipped:
        print(f"{manifest.skipped:,} malformed documents skipped", file=sys.stderr)
    print(json.dumps(dataclasses.asdict(manifest)))


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
