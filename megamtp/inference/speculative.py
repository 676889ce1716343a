"""Self-speculative decoding: the extra heads draft, head 1 verifies (arXiv:2404.19737, section 3.2).

One step is one forward pass. Into it go, for every row, the last token that is certain and the drafts that hang on it
(``Tree``). Head 1 says what the model wants after each of them; the drafts are followed as long as they are that, and
where they end, what the model wants there is one more token. The extra heads, from the last accepted position, then
draft for the next step. So a step yields between one token, what plain decoding yields, and one more than there are
drafting heads; without drafts it *is* plain decoding.

What the model wants is the likeliest token, or a draw. In a chain, drafts are drawn as well, each from its head's
distribution q; drawn from the model's distribution p it would have been the draft with probability min(1, p / q), and
else a token of max(p - q, 0) (Leviathan et al. 2023, arXiv:2211.17192): the tokens have exactly the distribution of
ordinary sampling. In a tree, drafts are the heads' likeliest tokens; the model's draw is followed where it meets one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megamtp.inference.decoder import Decoder, Positions
from megamtp.inference.native.decoder import NativeDecoder, NativePositions
from megamtp.inference.sampling import Sampling, draw
from megamtp.inference.tree import Tree


@dataclass
class Statistics:
    """Counts over rows and steps: a row's share in one forward pass is one ``forward``; prompts do not count."""

    forwards: int = 0
    tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # [k]: times that the k-th drafting head's token was accepted

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else float("nan")

    @property
    def acceptance(self) -> list[float]:
        """Of each drafting head: of the forwards, the share that accepted its draft (and all nearer ones)."""
        return [count / self.forwards if self.forwards else float("nan") for count in self.accepted]


class _Row:
    """A sequence in the making: how many of its tokens the cache holds, the next one, and the drafts after it."""

    def __init__(self, length: int, token: int, drafts: list[int], q: Tensor | None):
        self.length, self.token, self.drafts, self.q = length, token, drafts, q


class SpeculativeDecoder:
    """Decodes up to ``n_rows`` sequences of up to ``capacity`` tokens side by side, each at its own pace."""

    def __init__(
        self,
        decoder: Decoder | NativeDecoder,
        tree: Tree,
        sampling: Sampling,
        n_rows: int,
        capacity: int,
        generator: torch.Generator | None = None,
    ):
        self.decoder, self.tree, self.sampling, self.generator = decoder, tree, sampling, generator
        self.cache = decoder.new_cache(n_rows, capacity + tree.n_nodes, tree.n_heads)
        self.rows: list[_Row] = []
        self.statistics = Statistics(accepted=[0] * tree.n_heads)

    @torch.inference_mode()
    def start(self, index: int, prompt: Tensor) -> int:
        """Begin a sequence (t,) in row ``index``, the next free one or one to replace. Returns its first new token."""
        at = self.decoder.prompt_positions(index, len(prompt))
        z = self.decoder.trunk(prompt[None].to(self.decoder.device), at, self.cache)
        logits = self.decoder.head_1_at_end(z, at, self.cache)
        if self.sampling.is_greedy:
            token = logits.argmax(-1)
        else:
            token = draw(self.sampling.probabilities(logits), self.generator)
        drafts, q = self._draft(z, at, [len(prompt)])
        self.rows[index : index + 1] = [_Row(len(prompt), token.item(), drafts[0], None if q is None else q[0])]
        return token.item()

    def drop(self, index: int) -> None:
        """End the sequence of a row; the last row takes its place."""
        last = self.rows.pop()
        if index < len(self.rows):
            self.cache.move_row(len(self.rows), index, last.length)
            self.rows[index] = last

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """One forward pass: the new tokens of each row, at least one."""
        rows, tree, decoder = self.rows, self.tree, self.decoder
        lengths = [row.length for row in rows]
        tokens = torch.tensor([[row.token, *row.drafts] for row in rows], device=decoder.device)  # (b, nodes)
        at = decoder.next_positions(lengths, tree.n_nodes, None if tree.is_chain else tree)
        z = decoder.trunk(tokens, at, self.cache)
        picks = self._picks(decoder.head_1(z, at, self.cache), tokens).tolist()
        paths = [tree.follow(row.drafts, wanted) for row, wanted in zip(rows, picks, strict=True)]
        new = [[wanted[node] for node in path] for wanted, path in zip(picks, paths, strict=True)]
        self._count(paths)
        drafts, q = [[] for _ in rows], None
        if tree.widths:
            drafts, q = self._draft_after(paths, z, lengths)
        for index, row in enumerate(rows):
            row.length += len(paths[index])
            row.token, row.drafts, row.q = new[index][-1], drafts[index], None if q is None else q[index]
        return new

    def _picks(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """What the model wants after each node: logits (b, nodes, V), tokens (b, nodes) -> (b, nodes)."""
        if self.sampling.is_greedy:
            return logits.argmax(-1)
        p = self.sampling.probabilities(logits)
        if self.rows[0].q is None:
            return draw(p, self.generator)
        # A chain: the draft after node i is tokens[:, i + 1], drawn from q[:, i].
        q, drafted = torch.stack([row.q for row in self.rows]), tokens[:, 1:, None]
        p_draft, q_draft = p[:, :-1].gather(2, drafted), q.gather(2, drafted)
        chance = torch.rand(p_draft.shape, generator=self.generator, dtype=p.dtype, device=p.device)
        accepted = (chance * q_draft < p_draft).squeeze(2)
        rest = (p[:, :-1] - q).clamp_(min=0)
        # Where p = q nothing is ever rejected, and nothing would be left to draw from.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, :-1])
        drawn = draw(torch.cat([rest, p[:, -1:]], 1), self.generator)
        drawn[:, :-1] = tokens[:, 1:].where(accepted, drawn[:, :-1])
        return drawn

    def _draft_after(
        self, paths: list[list[int]], z: Tensor, lengths: list[int]
    ) -> tuple[list[list[int]], Tensor | None]:
        """Drafts that follow the accepted ``paths``, whose trunk outputs are in z (b, nodes, d)."""
        counts = [len(path) for path in paths]
        longest = max(counts)
        if self.tree.is_chain:
            z = z[:, :longest]
        else:
            for index, path in enumerate(paths):
                if path != list(range(len(path))):
                    sources = [lengths[index] + node for node in path]
                    # The verified layers; the drafting heads have not written yet.
                    self.cache.move(range(self.decoder.config.n_trunk_layers + 1), index, sources, lengths[index])
            nodes = torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=z.device)
            z = z.gather(1, nodes.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        return self._draft(z, self.decoder.path_positions(lengths, counts), counts)

    def _draft(
        self, z: Tensor, at: Positions | NativePositions, counts: list[int]
    ) -> tuple[list[list[int]], Tensor | None]:
        """(each row's drafts in the tree's order, the distributions (b, heads, V) that they were drawn from)."""
        tree = self.tree
        if not tree.widths:
            return [[] for _ in z], None
        logits = self.decoder.draft(z, at, counts, tree.n_heads, self.cache)  # (b, heads, V)
        if not tree.is_chain:
            candidates = logits.topk(max(tree.widths), -1).indices.flatten(1)  # (b, heads * widest)
            return candidates[:, tree.choices].tolist(), None
        if self.sampling.is_greedy:
            return logits.argmax(-1).tolist(), None
        q = self.sampling.probabilities(logits)
        return draw(q, self.generator).tolist(), q

    def _count(self, paths: list[list[int]]) -> None:
        self.statistics.forwards += len(paths)
        for path in paths:
            self.statistics.tokens += len(path)
            for depth in range(len(path) - 1):
                self.statistics.accepted[depth] += 1
