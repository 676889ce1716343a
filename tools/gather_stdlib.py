"""Gather the running interpreter's standard library into train.jsonl and validation.jsonl."""

import argparse

from megamtp.data.preprocess.stdlib_corpus import gather_stdlib, stdlib_root
from megamtp.errors import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", required=True, help="folder for train.jsonl and validation.jsonl")
    parser.add_argument("--with-tests", action="store_true", help="take the library's test suites too: 2-3x the text")
    options = parser.parse_args(arguments)
    stats = gather_stdlib(stdlib_root(), options.output_dir, include_tests=options.with_tests)
    for name, size in (("train", stats.train), ("validation", stats.validation)):
        print(f"{options.output_dir}/{name}.jsonl: {size.files} files, {size.bytes / 1e6:.2f} MB")
    print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in stats.skipped.items()))


if __name__ == "__main__":
    main()
