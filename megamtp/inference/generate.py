"""Complete prompts: many of different lengths in one batch; where one ends, the next takes its row."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from megamtp.errors import UserError
from megamtp.inference.decoder import Decoder
from megamtp.inference.native.decoder import NativeDecoder
from megamtp.inference.sampling import Sampling
from megamtp.inference.speculative import SpeculativeDecoder, Statistics
from megamtp.inference.tree import Tree


@dataclass
class Completion:
    """New tokens of a prompt, without the stop token."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop": a stop token; "length": max_new_tokens; "context": the context is full


@dataclass
class Generation:
    completions: list[Completion]  # in the order of the prompts
    statistics: Statistics
    seconds: float  # prompts included

    @property
    def n_tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds


def generate(
    decoder: Decoder | NativeDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    draft_heads: int | None = None,
    tree: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Generation:
    """Continue each prompt (token ids) by head 1, drafting with ``draft_heads`` of the other heads (default: all).

    ``tree`` gives the number of candidates of each drafting head instead. ``on_tokens(index, new)`` is told of new
    tokens as they come. Raises ``UserError`` for a prompt that is empty or longer than the context, and for more
    drafting heads than the model has.
    """
    check_request(decoder, prompts, max_new_tokens, batch_size)
    started = time.perf_counter()
    completions = [Completion() for _ in prompts]
    # The last token that is generated need not go in again.
    limits = [min(max_new_tokens, decoder.context + 1 - len(prompt)) for prompt in prompts]
    capacity = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=1)
    widths = draft_widths(decoder.n_heads, draft_heads, tree)
    n_rows = min(batch_size, len(prompts))
    speculative = SpeculativeDecoder(
        decoder, Tree(widths, decoder.device), sampling or Sampling(), n_rows, capacity, generator
    )
    stops = frozenset(stop_tokens)
    waiting = deque(range(len(prompts)))
    active: list[int] = []  # the prompt of each row

    def add(index: int, new: list[int]) -> None:
        completion = completions[index]
        kept = []
        for token in new:
            if completion.finish_reason:
                break
            if token in stops:
                completion.finish_reason = "stop"
                break
            kept.append(token)
            completion.tokens.append(token)
            if len(completion.tokens) == limits[index]:
                completion.finish_reason = "length" if limits[index] == max_new_tokens else "context"
        if on_tokens and kept:
            on_tokens(index, kept)

    def begin(row: int) -> int:
        index = waiting.popleft()
        add(index, [speculative.start(row, torch.tensor(prompts[index]))])
        return index

    while True:
        row = 0
        while row < len(active) or waiting and len(active) < n_rows:
            if row == len(active):
                active.append(begin(row))
            elif not completions[active[row]].finish_reason:
                row += 1
            elif waiting:
                active[row] = begin(row)
            else:
                speculative.drop(row)
                last = active.pop()
                if row < len(active):
                    active[row] = last
        if not active:
            return Generation(completions, speculative.statistics, time.perf_counter() - started)
        for index, new in zip(active, speculative.step(), strict=True):
            add(index, new)


def check_request(
    decoder: Decoder | NativeDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> None:
    """``UserError`` for what ``generate`` would not do."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; use at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty: the model needs at least one token to continue")
        if len(prompt) > decoder.context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens; the model's context is {decoder.context}: shorten the prompt"
            )


def draft_widths(n_heads: int, draft_heads: int | None, tree: Sequence[int] | None) -> tuple[int, ...]:
    """Candidates per drafting head. ``UserError`` where the model has too few heads, or the two disagree."""
    if tree is not None and draft_heads is not None and len(tree) != draft_heads:
        raise UserError(f"--tree {','.join(map(str, tree))} is for {len(tree)} heads, --draft-heads is {draft_heads}")
    widths = tuple(tree) if tree is not None else (1,) * (n_heads - 1 if draft_heads is None else draft_heads)
    if len(widths) > n_heads - 1:
        raise UserError(
            f"--draft-heads {len(widths)}: the model has {n_heads} heads, of which {n_heads - 1} can draft; "
            f"use {'0' if n_heads == 1 else f'0 to {n_heads - 1}'}"
        )
    if draft_heads is not None and draft_heads < 0 or any(width < 1 for width in widths):
        raise UserError("--draft-heads and the entries of --tree must not be negative or, in the tree, 0")
    return widths
