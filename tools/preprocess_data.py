"""Text (JSONL) -> ``.bin/.idx`` training data.

python tools/preprocess_data.py --input corpus/ more.jsonl.gz --tokenizer tokenizer.json --output data/corpus
"""

import argparse
import json

from megamtp.data.preprocess.encode import preprocess
from megamtp.data.preprocess.tokenizer import END_OF_DOCUMENT
from megamtp.errors import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Encode JSONL text as .bin/.idx training data.")
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files (.gz too), folders or globs")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json")
    parser.add_argument("--output", required=True, help="path of the result without .bin or .idx")
    parser.add_argument("--text-key", default="text", help="key of the text in each line (default: %(default)s)")
    parser.add_argument("--eod", default=END_OF_DOCUMENT, help="token that ends a document (default: %(default)s)")
    options = parser.parse_args(arguments)
    stats = preprocess(options.input, options.tokenizer, options.output, options.text_key, options.eod, progress=True)
    print(json.dumps(stats))


if __name__ == "__main__":
    main()
