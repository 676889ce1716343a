"""The ``README.md`` of an exported model: what is known of it, and how to load it."""

from typing import Any

import torch

from megamtp.convert.formats import extra_head, logical_names, logical_shape
from megamtp.model.transformer import ModelConfig

TRANSFORMERS = "4.57"  # the oldest that exports were tested with


def model_card(config: ModelConfig, context: int | None, facts: dict[str, Any], dtype: str, has_tokenizer: bool) -> str:
    """Markdown. It depends on nothing but its arguments, so that the same model has the same card."""
    n = config.n_future_tokens
    sizes = {name: torch.Size(logical_shape(name, config)).numel() for name in logical_names(config)}
    total, extra = sum(sizes.values()), sum(size for name, size in sizes.items() if extra_head(name))
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        + ("tags:\n- multi-token-prediction\n" if n > 1 else "")
        + "---",
        f"# Llama with {n} heads for multi-token prediction" if n > 1 else "# Llama",
        _introduction(config),
        "## Architecture\n\n" + _table(_architecture(config, context, dtype, total, extra)),
    ]
    if training := _training(facts):
        sections.append("## Training\n\n" + _table(training))
    if losses := facts.get("validation_loss_per_head"):
        accuracies = facts.get("validation_accuracy_per_head") or [None] * len(losses)
        rows = [("head", "validation loss (nats per token)", "top-1 accuracy")]
        for k, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1):
            rows.append((str(k), _number(loss, ".4f"), _number(accuracy, ".4f")))
        sections.append(f"## Validation\n\nAt step {facts['validation_step']:,}:\n\n" + _table(rows))
    sections.append("## Loading\n\n" + _loading(n, has_tokenizer))
    return "\n\n".join(sections) + "\n"


def _introduction(config: ModelConfig) -> str:
    n = config.n_future_tokens
    unembedding = "an unembedding for each" if config.replicated_unembedding else "one unembedding"
    if n == 1:
        return "A decoder-only language model in the Llama architecture, pretrained with megamtp."
    return (
        f"A decoder-only language model that was trained to predict the next {n} tokens at once (multi-token "
        f"prediction, arXiv:2404.19737): a shared trunk and {n} heads, each one Llama block, with one final norm and "
        f"{unembedding}. Trunk and head 1, the next-token head, are a plain Llama, which is what `transformers` "
        f"loads without custom code. Heads 2 to {n} lie in `extra_heads.safetensors`."
    )


def _architecture(
    config: ModelConfig, context: int | None, dtype: str, total: int, extra: int
) -> list[tuple[str, ...]]:
    n = config.n_future_tokens
    rows = [
        ("", ""),
        ("parameters", f"{total:,}" + (f", of them {total - extra:,} in the plain Llama" if extra else "")),
        ("layers", f"{config.n_layers}: {config.n_trunk_layers} in the trunk + {n} head{'s' if n > 1 else ''}"),
        ("width", f"{config.dim:,}, feed-forward {config.hidden_dim:,}"),
        ("attention heads", f"{config.n_heads}, key/value heads {config.kv_heads}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("rotary base", f"{config.rope_theta:,.0f}"),
        ("context", f"{context:,}" if context else "not recorded"),
        ("stored as", dtype),
    ]
    return rows


def _training(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("", "")]

    def add(label: str, key: str, text) -> None:
        if facts.get(key) is not None:
            rows.append((label, text(facts[key])))

    add("converted from", "converted_from", str)
    add("started from", "started_from", str)
    planned = facts.get("steps_planned")
    add("steps", "step", lambda step: f"{step:,}" + (f" of {planned:,}" if planned else ""))
    add("tokens", "tokens", lambda tokens: f"{tokens:,}")
    add("batch", "batch_tokens", lambda n: f"{n:,} tokens: {facts['batch_sequences']:,} x {facts['sequence_length']:,}")
    add(
        "learning rate",
        "learning_rate",
        lambda peak: (
            f"{peak:g} after {facts['warmup_steps']:,} steps of warm-up, cosine to {facts['final_learning_rate']:g}"
        ),
    )
    add("optimizer", "optimizer", str)
    add("weights of the heads' losses", "loss_weights", lambda weights: ", ".join(f"{weight:g}" for weight in weights))
    add("precision", "precision", str)
    add("seed", "seed", str)
    add("layout", "layout", str)
    add("data", "data", lambda data: ", ".join(_share(source, data) for source in data))
    add("program", "program", str)
    return rows[1:] and rows


def _share(source: dict[str, Any], data: list[dict[str, Any]]) -> str:
    share = source["weight"] / sum(each["weight"] for each in data)
    return source["name"] if len(data) == 1 else f"{source['name']} ({share:.1%})"


def _loading(n: int, has_tokenizer: bool) -> str:
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)\n" if has_tokenizer else ""
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    plain = (
        f"```python\nfrom transformers import {names}\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n"
        f"{tokenizer}```"
    )
    needs = f"Needs `transformers` {TRANSFORMERS} or newer.\n\n"
    if n == 1:
        return needs + plain
    return needs + (
        f"The plain Llama, without custom code:\n\n{plain}\n\nAll {n} heads, with this folder's "
        "`modeling_megamtp.py`, which also drafts tokens with them to generate faster:\n\n"
        "```python\nmodel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n```"
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
