"""Train a byte-level BPE tokenizer on the text of JSONL or Parquet files."""

import argparse

from megamtp.data.preprocess.documents import iterate_documents
from megamtp.data.preprocess.inputs import find_files
from megamtp.data.preprocess.train_bpe import train_bpe
from megamtp.errors import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet; folders; globs"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, 257 at least")
    parser.add_argument("--output", required=True, help="where tokenizer.json is written")
    parser.add_argument("--text-key", default="text", help="key of the text in each line (default: %(default)s)")
    options = parser.parse_args(arguments)
    texts = (text for text, _ in iterate_documents(find_files(options.input), options.text_key))
    size = train_bpe(texts, options.vocab_size, options.output)
    print(f"{options.output}: {size} tokens")


if __name__ == "__main__":
    main()
