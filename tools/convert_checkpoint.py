"""Convert models: out to Hugging Face's format, and in, to a run folder at step 0.

python tools/convert_checkpoint.py export runs/demo exports/demo      # a run, a checkpoint, or any model folder
python tools/convert_checkpoint.py import Llama-folder runs/from_llama --n-future-tokens 4
python pretrain.py my.yaml --run_dir runs/from_llama                   # with the model: section of its model.yaml
"""

import argparse

from megamtp.errors import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="any source -> a Hugging Face folder")
    into = commands.add_parser("import", help="any source -> a run folder at step 0")
    for command in (out, into):
        command.add_argument("source", help="a run, a checkpoint, a Hugging Face Llama, or Meta's folder")
        command.add_argument("output", help="folder to write")
        command.add_argument("--force", action="store_true", help="replace the output of an earlier conversion")
    out.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="bf16", help="default: %(default)s")
    out.add_argument("--tokenizer", help="a tokenizer.json, a folder, a .model, or bytes; default: the source's")
    out.add_argument("--context", type=positive, help="positions that config.json allows; default: the source's")
    out.add_argument("--shard-size", default="4GB", help="largest file of weights (default: %(default)s)")
    into.add_argument("--n-future-tokens", type=positive, help="heads; default: as many as the source has")
    into.add_argument("--new-heads", choices=("copy", "random"), default="copy", help="of head 1, or random")
    into.add_argument("--seed", type=int, default=0, help="of random heads (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "export":
        from megamtp.convert.base import DTYPES
        from megamtp.convert.export import export, parse_size

        export(
            options.source,
            options.output,
            dtype=DTYPES[options.dtype],
            tokenizer=options.tokenizer,
            context=options.context,
            shard_bytes=parse_size(options.shard_size),
            force=options.force,
        )
    else:
        from megamtp.convert.import_run import import_run

        import_run(
            options.source,
            options.output,
            n_future_tokens=options.n_future_tokens,
            new_heads=options.new_heads,
            seed=options.seed,
            force=options.force,
        )
    print(f"{options.output}: written")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    main()
