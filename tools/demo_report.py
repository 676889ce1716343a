"""What the demo has to show: model against bigram, the loss curves, a completion, and where to go next."""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megamtp.data.preprocess.documents import iterate_documents
from megamtp.data.tokenizer import load_tokenizer
from megamtp.errors import UserError, exits_cleanly
from megamtp.evaluation.baseline import bigram_validation_loss
from megamtp.evaluation.loss_curves import plot_losses, read_curves
from megamtp.inference.generate import TrainedRun, generate, load_run
from megamtp.training.loop import open_run_data

PROMPT_LINES = 5
PROMPT_TOKENS = 100


def compare_with_bigram(run: TrainedRun) -> tuple[float, float]:
    """(validation loss of head 1, of the bigram), nats per token."""
    train, validation = open_run_data(run.config)
    if not validation:
        raise UserError(f"{run.config.run_dir}: was trained without data.validation; there is nothing to compare")
    bigram = bigram_validation_loss(
        train,
        next(iter(validation.values())),
        consumed_samples=run.checkpoint.manifest["state"]["loader"]["consumed_samples"],
        vocab_size=run.config.model.vocab_size,
        mask_cross_document=run.config.data.mask_cross_document_targets,
    )
    curves = read_curves(Path(run.config.run_dir))
    return float(curves.validation_loss[-1, 0]), bigram


def held_out_functions(path: Path) -> Iterator[tuple[str, str]]:
    """(first lines, the lines that really follow) of functions in the held-out sources."""
    for text, _ in iterate_documents([path]):
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 2 * PROMPT_LINES:
                first, last = node.lineno - 1, node.lineno - 1 + PROMPT_LINES
                yield "\n".join(lines[first:last]) + "\n", "\n".join(lines[last : last + PROMPT_LINES])


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--validation-text", type=Path, required=True, help="JSONL of the held-out documents")
    options = parser.parse_args(arguments)
    run_dir = Path(options.run_dir)
    run = load_run(run_dir)
    tokenizer = load_tokenizer(run.config.data.tokenizer)

    model_loss, bigram_loss = compare_with_bigram(run)
    plot_losses(run_dir, run_dir / "losses.png", baseline=("Kneser-Ney bigram", bigram_loss))
    (run_dir / "summary.json").write_text(
        json.dumps({"head_1_validation_loss": model_loss, "bigram_validation_loss": bigram_loss}) + "\n"
    )
    functions = list(held_out_functions(options.validation_text))
    if not functions:
        raise UserError(f"{options.validation_text}: holds no function of {2 * PROMPT_LINES} lines to complete")
    short = (pair for pair in functions if len(tokenizer.encode(pair[0])) <= PROMPT_TOKENS)
    prompt, truth = next(short, min(functions, key=lambda pair: len(pair[0])))
    new = generate(
        run.model,
        torch.tensor(tokenizer.encode(prompt)),
        60,
        context=run.config.data.seq_len,
        temperature=0.5,
        stop_token=0,
        generator=torch.Generator().manual_seed(0),
    )
    verdict = "beats" if model_loss < bigram_loss else "does NOT beat"
    consumed = run.checkpoint.manifest["state"]["counters"]["tokens"]
    print(
        f"\n--- first lines of a held-out function\n{prompt}"
        f"--- the model goes on\n{tokenizer.decode(new.tolist())}\n"
        f"--- the file goes on\n{truth}\n\n"
        f"validation loss, nats per token, after {consumed:,} training tokens\n"
        f"  head 1, the next token                {model_loss:.3f}\n"
        f"  Kneser-Ney bigram on the same tokens  {bigram_loss:.3f}\n"
        f"head 1 {verdict} the bigram.\n\n"
        f"loss curves of every head   {run_dir / 'losses.png'}\n"
        f"one line a step             {run_dir / 'metrics.jsonl'}\n"
        f"TensorBoard                 tensorboard --logdir {run_dir / 'tensorboard'}\n"
        f"resolved config             {run_dir / 'config.yaml'}\n"
        f"newest checkpoint           {run.checkpoint.path}\n\n"
        "try next\n"
        f'  .venv/bin/python tools/generate.py {run_dir} --prompt "def read_file(path):" --temperature 0.5\n'
        "  .venv/bin/python pretrain.py configs/demo.yaml --run_dir runs/n1 --model.n_future_tokens 1 "
        "--heads.loss_weights null\n"
        "  .venv/bin/python pretrain.py configs/demo.yaml --dry-run"
    )


if __name__ == "__main__":
    main()
