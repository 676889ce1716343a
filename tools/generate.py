"""Continue texts with a trained model; the extra heads draft, head 1 verifies.

python tools/generate.py runs/demo --prompt "def main():"                      # a run, or an exported folder
python tools/generate.py export/demo --prompt-file main.py --compare           # and the speed without drafts
python tools/generate.py runs/demo --jsonl prompts.jsonl --output completions.jsonl --batch-size 16

A line of the JSONL is {"prompt": text, ...}; the output has its other keys too, and "completion", "tokens" and
"finish_reason" (stop, length, context).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megamtp.errors import UserError, exits_cleanly
from megamtp.files import discard, open_temporary, publish
from megamtp.inference.generate import Generation, check_request, draft_widths, generate
from megamtp.inference.load import BACKENDS, DTYPES, LoadedModel, load_model
from megamtp.inference.sampling import Sampling
from megamtp.inference.text import TextStream


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.output and not options.jsonl:
        raise UserError("--output goes with --jsonl; a single completion goes to standard output")
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    lines = read_prompts(options)
    model = load_model(
        options.model,
        tokenizer=options.tokenizer,
        context=options.context,
        dtype=options.dtype,
        device=options.device,
        backend=options.backend,
    )
    prompts = [model.tokenizer.encode(line["prompt"]) for line in lines]
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": sampling,
        "batch_size": options.batch_size,
        "stop_tokens": stop_tokens(model, options.stop),
    }
    drafts = {"draft_heads": options.draft_heads, "tree": options.tree}
    widths = draft_widths(model.decoder.n_heads, **drafts)

    def run(on_tokens=None, **how) -> Generation:
        generator = torch.Generator(model.decoder.device).manual_seed(options.seed)
        return generate(model.decoder, prompts, generator=generator, on_tokens=on_tokens, **settings, **how)

    if options.jsonl:
        generation = run(**drafts)
        write_completions(lines, generation, model, options.output)
    else:
        check_request(
            model.decoder, prompts, options.max_new_tokens, options.batch_size
        )  # before the first line of output
        stream = TextStream(model.tokenizer, prompts[0])
        print(lines[0]["prompt"], end="", flush=True)
        generation = run(lambda _, new: print(stream.add(new), end="", flush=True), **drafts)
        print(stream.end(), flush=True)
    print(summary(generation, widths), file=sys.stderr)
    if options.compare:  # both once more: the first run warmed up, and wrote as it went
        speeds = [run(**how).tokens_per_second for how in (drafts, {"draft_heads": 0})]
        factor = speeds[0] / speeds[1]
        print(
            f"once more: with drafts {speeds[0]:,.1f} tokens/s, without drafts {speeds[1]:,.1f}: {factor:.2f}x",
            file=sys.stderr,
        )


def read_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry with the key "prompt" for each text. ``UserError`` for what cannot be read, with file and line."""
    if options.jsonl is None:
        if options.prompt is not None:
            text = options.prompt
        else:
            text = _read(options.prompt_file) if options.prompt_file else sys.stdin.read()
        if not text:
            raise UserError("the prompt is empty; give --prompt TEXT, --prompt-file FILE or text on standard input")
        return [{"prompt": text}]
    lines = []
    for number, line in enumerate(_read(options.jsonl).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{options.jsonl}:{number}: not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
            raise UserError(f'{options.jsonl}:{number}: needs a "prompt" that is a text and not empty')
        lines.append(entry)
    if not lines:
        raise UserError(f"{options.jsonl}: holds no prompt")
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def stop_tokens(model: LoadedModel, texts: list[str]) -> set[int]:
    """The end of a document, and each of ``texts``, which must be one token. ``UserError`` where it is not."""
    found = {model.eos_id} - {None}
    for text in texts:
        token = model.tokenizer.token_to_id(text)
        ids = [token] if token is not None else model.tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(f"--stop {text!r} is {len(ids)} tokens of this tokenizer; give a text that is one")
        found |= set(ids)
    return found


def write_completions(lines: list[dict[str, Any]], generation: Generation, model: LoadedModel, path: Path | None):
    """JSONL to ``path``, which appears when it is whole, or to standard output."""
    rows = []
    for line, completion in zip(lines, generation.completions, strict=True):
        text = model.tokenizer.decode(completion.tokens)
        row = {**line, "completion": text, "tokens": completion.tokens, "finish_reason": completion.finish_reason}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    if path is None:
        sys.stdout.writelines(rows)
        return
    file = open_temporary(path)
    try:
        file.write("".join(rows).encode())
        publish(file, path)
    finally:
        discard(file)


def summary(generation: Generation, widths: tuple[int, ...]) -> str:
    """One line: speed, tokens per forward pass, how often each drafting head was followed."""
    counts = generation.statistics
    text = f"{generation.n_tokens:,} tokens, {generation.tokens_per_second:,.1f} tokens/s"
    if not widths or not counts.forwards:
        return text
    accepted = ", ".join(f"head {k} {share:.0%}" for k, share in enumerate(counts.acceptance, 2))
    return f"{text}, {counts.tokens_per_forward:.2f} tokens per forward pass; accepted: {accepted}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run, a checkpoint, an export, a Hugging Face Llama, Meta's release")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue; default: standard input")
    source.add_argument("--prompt-file", type=Path, help="file whose text is continued")
    source.add_argument("--jsonl", type=Path, help="many prompts, one a line")
    parser.add_argument("--output", type=Path, help="with --jsonl: file of the completions; default: standard output")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach P together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--draft-heads", type=int, help="extra heads that draft; 0 = plain decoding; default: all")
    parser.add_argument("--tree", type=_widths, help="candidates per drafting head, as 3,2,1; default: one each")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="token that ends a completion; may be repeated")
    parser.add_argument("--tokenizer", help="where the model's folder names none that is there")
    parser.add_argument("--context", type=int, help="positions; where the model's folder does not tell")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="native: compiled, on a CPU in fp32; graphs: CUDA graphs",
    )
    parser.add_argument("--compare", action="store_true", help="decode without drafts too, and tell both speeds")
    return parser


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
