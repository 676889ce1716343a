"""Several ``.bin/.idx`` data sets into one, their documents one after another.

python tools/merge_data.py --input data/corpus-*-of-00008.idx --output data/corpus
"""

import argparse
import dataclasses
import json
import signal

from megamtp.data.merge import merge
from megamtp.errors import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="in this order; .idx may follow, for globs"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the result without .bin or .idx")
    parser.add_argument("--remove", action="store_true", help="remove the inputs once the result is written")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit cleans up as a Ctrl-C does
    prefixes = [prefix.removesuffix(".idx") for prefix in options.input]
    manifest = merge(prefixes, options.output, progress=True, remove=options.remove)
    print(json.dumps(dataclasses.asdict(manifest)))


if __name__ == "__main__":
    main()
