"""Check data sets against their manifests: structure, sizes and checksums. Reads everything.

python tools/verify_data.py data/corpus data/more
python tools/verify_data.py --write-manifest --tokenizer tokenizer.json data/from_megatron   # for data made elsewhere
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.manifest import Manifest, make_manifest
from megamtp.data.tokenizer import load_tokenizer
from megamtp.errors import UserError, exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a .bin/.idx pair without the ending")
    parser.add_argument("--write-manifest", action="store_true", help="describe the files as they are, anew")
    parser.add_argument("--tokenizer", help="with --write-manifest: what the data was made with")
    parser.add_argument("--eod", help="with --write-manifest: the token that ends documents")
    options = parser.parse_args(arguments)
    if (options.tokenizer or options.eod) and not options.write_manifest:
        parser.error("--tokenizer and --eod go with --write-manifest")
    for prefix in options.prefixes:
        if options.write_manifest:
            write_manifest(prefix, options.tokenizer, options.eod)
        else:
            verify_pair(prefix)


def verify_pair(prefix: str) -> None:
    """Print one line for a pair that is whole. ``UserError`` for one that is not, or has no manifest."""
    dataset = IndexedDataset(prefix)
    manifest = Manifest.read(prefix)
    if manifest is None:
        raise UserError(f"{prefix}: no manifest to verify it by; make one with --write-manifest")
    manifest.require_sizes(dataset)
    total = manifest.bin_bytes + manifest.idx_bytes
    # Hashing releases the interpreter: threads share the chunks of a large file.
    with tqdm(total=total, unit="B", unit_scale=True, desc=prefix, leave=False) as bar:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for n_bytes in threads.map(lambda index: manifest.check(prefix, index), range(manifest.n_checks())):
                bar.update(n_bytes)
    print(f"{prefix}: whole: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {total:,} bytes")


def write_manifest(prefix: str, tokenizer_path: str | None, eod: str | None) -> None:
    """Describe a pair. ``UserError`` where it is damaged, or holds tokens that the tokenizer does not have."""
    dataset = IndexedDataset(prefix)
    source = {}
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path)
        eod_token, eod_id = tokenizer.eod(eod)
        source = {
            "vocab_size": tokenizer.vocab_size,
            "eod_token": eod_token,
            "eod_id": eod_id,
            "tokenizer_sha256": tokenizer.fingerprint,
        }
    manifest = make_manifest(dataset, **source)
    if manifest.vocab_size is not None and manifest.max_token >= manifest.vocab_size:
        raise UserError(
            f"{prefix}: holds token {manifest.max_token}, {tokenizer_path} has {manifest.vocab_size} tokens; "
            "give the tokenizer that made the data"
        )
    manifest.write(prefix)
    print(f"{prefix}: manifest written: {manifest.documents:,} documents, {manifest.tokens:,} tokens")


if __name__ == "__main__":
    main()
