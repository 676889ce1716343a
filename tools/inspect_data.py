"""Look into data sets: counts, lengths of documents, decoded text.

python tools/inspect_data.py data/corpus --tokenizer tokenizer.json --show 3
"""

import argparse

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.inspect import document_lengths, document_tokens, length_table, pick_documents
from megamtp.data.manifest import Manifest
from megamtp.data.tokenizer import load_tokenizer
from megamtp.errors import exits_cleanly

CHARACTERS = 600  # of a document that are shown, half of them its end


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a .bin/.idx pair without the ending")
    parser.add_argument("--tokenizer", help="decode with this one: tokenizer.json, folder, .model or bytes")
    parser.add_argument("--show", type=int, default=3, help="documents to show (default: %(default)s)")
    parser.add_argument("--documents", type=int, nargs="+", help="which documents to show, counted from 0")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    for prefix in options.prefixes:
        dataset, manifest = IndexedDataset(prefix), Manifest.read(prefix)
        print(describe(dataset, manifest))
        if manifest and tokenizer:
            manifest.require_tokenizer(prefix, tokenizer.fingerprint, tokenizer.name)
        chosen = options.documents
        if chosen is None:
            chosen = pick_documents(dataset, options.show, options.seed)
        elif beyond := [i for i in chosen if not 0 <= i < dataset.n_documents]:
            parser.error(f"--documents {beyond[0]}: {prefix} has {dataset.n_documents} documents, counted from 0")
        for document in chosen:
            ids = document_tokens(dataset, document)
            print(f"\n--- document {document}, {len(ids):,} tokens")
            print(shorten(tokenizer.decode(ids.tolist()), CHARACTERS) if tokenizer else shorten_ids(ids.tolist()))


def describe(dataset: IndexedDataset, manifest: Manifest | None) -> str:
    """Everything that is known of a data set, a line each, and the histogram of lengths."""
    lengths = document_lengths(dataset)
    quantiles = ", ".join(f"{share:.0%} {length:,}" for share, length in lengths.quantiles.items())
    rows = {
        "documents": f"{dataset.n_documents:,}" + (f", {lengths.empty:,} of them empty" if lengths.empty else ""),
        "tokens": f"{dataset.n_tokens:,} ({dataset.dtype}, {dataset.n_tokens * dataset.dtype.itemsize / 1e9:,.3f} GB)",
        "length": f"{lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}; {quantiles}",
    }
    if len(dataset) != dataset.n_documents:
        rows["sequences"] = f"{len(dataset):,}"
    if manifest is None:
        rows["manifest"] = "none; tools/verify_data.py --write-manifest makes one"
    else:
        manifest.require_sizes(dataset)
        rows["largest token"] = f"{manifest.max_token:,}, vocabulary {manifest.vocab_size or 'unknown'}"
        rows["end of document"] = f"{manifest.eod_token!r}, token {manifest.eod_id}"
        rows["tokenizer"] = f"sha256 {manifest.tokenizer_sha256 or 'unknown'}"
        rows["skipped"] = f"{manifest.skipped:,} malformed documents"
    width = max(map(len, rows))
    body = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
    return f"{dataset.prefix}\n{body}\n{length_table(lengths)}"


def shorten(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def shorten_ids(ids: list[int]) -> str:
    shown = ids if len(ids) <= 32 else [*ids[:16], "...", *ids[-16:]]
    return " ".join(map(str, shown))


if __name__ == "__main__":
    main()
