"""What the demo has to show: model against bigram, loss curves, a completion with and without drafts, where to go."""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from megamtp.config import load
from megamtp.data.preprocess.documents import iterate_documents
from megamtp.errors import UserError, exits_cleanly
from megamtp.evaluation.baseline import bigram_validation_loss
from megamtp.evaluation.loss_curves import plot_losses, read_curves
from megamtp.inference.generate import Generation, generate
from megamtp.inference.load import LoadedModel, load_model
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint
from megamtp.training.loop import open_run_data
from megamtp.training.run_config import RunConfig

PROMPT_LINES = 5
PROMPT_TOKENS = 100
NEW_TOKENS = 60
ROUNDS = 5  # of a completion with and without drafts


def compare_with_bigram(config: RunConfig, checkpoint: Checkpoint) -> tuple[float, float]:
    """(validation loss of head 1, of the bigram), nats per token."""
    train, validation = open_run_data(config)
    if not validation:
        raise UserError(f"{config.run_dir}: was trained without data.validation; there is nothing to compare")
    bigram = bigram_validation_loss(
        train,
        next(iter(validation.values())),
        consumed_samples=checkpoint.manifest["state"]["loader"]["consumed_samples"],
        vocab_size=config.model.vocab_size,
        mask_cross_document=config.data.mask_cross_document_targets,
    )
    curves = read_curves(Path(config.run_dir))
    return float(curves.validation_loss[-1, 0]), bigram


def held_out_functions(path: Path) -> Iterator[tuple[str, str]]:
    """(first lines, the lines that really follow) of functions in the held-out sources."""
    for text, _ in iterate_documents([path]):
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 2 * PROMPT_LINES:
                first, last = node.lineno - 1, node.lineno - 1 + PROMPT_LINES
                yield "\n".join(lines[first:last]) + "\n", "\n".join(lines[last : last + PROMPT_LINES])


def complete(model: LoadedModel, prompt: str) -> tuple[list[Generation], list[Generation]]:
    """The same greedy completion, several times by turns: with all heads, by head 1 alone."""
    stops = {model.eos_id} - {None}
    ids = model.tokenizer.encode(prompt)[-model.context // 2 :]  # room for the rest, however short the context
    drafted, plain = [], []
    for _ in range(ROUNDS):
        drafted.append(generate(model.decoder, [ids], NEW_TOKENS, stop_tokens=stops))
        plain.append(generate(model.decoder, [ids], NEW_TOKENS, draft_heads=0, stop_tokens=stops))
    return drafted, plain


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--validation-text", type=Path, required=True, help="JSONL of the held-out documents")
    options = parser.parse_args(arguments)
    run_dir = Path(options.run_dir)
    model = load_model(run_dir)
    config = load(RunConfig, run_dir / "config.yaml", [])
    checkpoint = Checkpoint.open(latest_checkpoint(run_dir / "checkpoints"))

    model_loss, bigram_loss = compare_with_bigram(config, checkpoint)
    plot_losses(run_dir, run_dir / "losses.png", baseline=("Kneser-Ney bigram", bigram_loss))
    (run_dir / "summary.json").write_text(
        json.dumps({"head_1_validation_loss": model_loss, "bigram_validation_loss": bigram_loss}) + "\n"
    )
    functions = list(held_out_functions(options.validation_text))
    if not functions:
        raise UserError(f"{options.validation_text}: holds no function of {2 * PROMPT_LINES} lines to complete")
    short = (pair for pair in functions if len(model.tokenizer.encode(pair[0])) <= PROMPT_TOKENS)
    prompt, truth = next(short, min(functions, key=lambda pair: len(pair[0])))
    drafted, plain = complete(model, prompt)
    text = model.tokenizer.decode(drafted[0].completions[0].tokens)
    speeds = [median(generation.tokens_per_second for generation in each) for each in (drafted, plain)]
    per_forward = drafted[0].statistics.tokens_per_forward
    verdict = "beats" if model_loss < bigram_loss else "does NOT beat"
    consumed = checkpoint.manifest["state"]["counters"]["tokens"]
    print(
        f"\n--- first lines of a held-out function\n{prompt}"
        f"--- the model goes on, the likeliest token each time\n{text}\n"
        f"--- the file goes on\n{truth}\n\n"
        f"validation loss, nats per token, after {consumed:,} training tokens\n"
        f"  head 1, the next token                {model_loss:.3f}\n"
        f"  Kneser-Ney bigram on the same tokens  {bigram_loss:.3f}\n"
        f"head 1 {verdict} the bigram.\n\n"
        f"the completion above, median of {ROUNDS}\n"
        f"  head 1 alone                          {speeds[1]:,.0f} tokens/s\n"
        f"  other heads draft, head 1 verifies    {speeds[0]:,.0f} tokens/s, {per_forward:.2f} tokens a forward\n\n"
        f"loss curves of every head   {run_dir / 'losses.png'}\n"
        f"one line a step             {run_dir / 'metrics.jsonl'}\n"
        f"TensorBoard                 tensorboard --logdir {run_dir / 'tensorboard'}\n"
        f"resolved config             {run_dir / 'config.yaml'}\n"
        f"newest checkpoint           {checkpoint.path}\n\n"
        "try next\n"
        f'  .venv/bin/python tools/generate.py {run_dir} --prompt "def read_file(path):" --temperature 0.5 --compare\n'
        f"  .venv/bin/python tools/convert_checkpoint.py export {run_dir} exports/demo    # for transformers\n"
        "  .venv/bin/python pretrain.py configs/demo.yaml --run_dir runs/n1 --model.n_future_tokens 1 "
        "--heads.loss_weights null\n"
        "  .venv/bin/python pretrain.py configs/demo.yaml --dry-run"
    )


if __name__ == "__main__":
    main()
