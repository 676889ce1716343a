"""Continue a text with the newest checkpoint of a run: python tools/generate.py runs/demo --prompt "def main():"."""

import argparse
import sys

import torch

from megamtp.data.datasets import DataConfig
from megamtp.data.manifest import Manifest
from megamtp.data.tokenizer import Tokenizer, load_tokenizer
from megamtp.errors import UserError, exits_cleanly
from megamtp.inference.generate import generate, load_run


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", help="folder of a training run")
    parser.add_argument("--prompt", help="text to continue; default: standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    options = parser.parse_args(arguments)
    run = load_run(options.run_dir)
    if run.config.data.tokenizer is None:
        raise UserError(f"{options.run_dir}: its config names no data.tokenizer; set it in config.yaml")
    tokenizer = load_tokenizer(run.config.data.tokenizer)
    text = options.prompt if options.prompt is not None else sys.stdin.read()
    prompt = torch.tensor(tokenizer.encode(text))
    if prompt.numel() == 0:
        raise UserError("the prompt is empty; give --prompt TEXT or text on standard input")
    new = generate(
        run.model,
        prompt,
        options.max_new_tokens,
        context=run.config.data.seq_len,
        temperature=options.temperature,
        stop_token=end_of_document(run.config.data, tokenizer),
        generator=torch.Generator().manual_seed(options.seed),
    )
    print(text + tokenizer.decode(new.tolist()))


def end_of_document(data: DataConfig, tokenizer: Tokenizer) -> int | None:
    """The token that ended documents in training, where the data is still there to tell; else the tokenizer's own."""
    manifest = Manifest.read(data.sources[0].path)
    if manifest and manifest.eod_id is not None:
        return manifest.eod_id
    return tokenizer.token_to_id(tokenizer.default_eod) if tokenizer.default_eod else None


if __name__ == "__main__":
    main()
