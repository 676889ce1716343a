"""Which drafts are verified together: a chain of the heads' first choices, or a tree (Medusa, arXiv:2401.10774).

Node 0 is the token that is known already; a node at depth k is a candidate of head k + 1, and each candidate of a depth
hangs under each node of the depth before.
"""

from functools import cached_property

import torch
from torch import Tensor


class Tree:
    """``widths[k]`` candidates of the k-th drafting head. (1, 1, 1) is a chain, () no draft at all."""

    def __init__(self, widths: tuple[int, ...], device: torch.device | str = "cpu"):
        self.widths, self.device = widths, device
        self.parents, self.depth_of, self.choice_of = [-1], [0], [0]
        level = [0]
        for depth, width in enumerate(widths, 1):
            level = [self._add(parent, depth, choice) for parent in level for choice in range(width)]
        self.children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            self.children[parent].append(node)

    def _add(self, parent: int, depth: int, choice: int) -> int:
        self.parents.append(parent)
        self.depth_of.append(depth)
        self.choice_of.append(choice)
        return len(self.parents) - 1

    @property
    def n_nodes(self) -> int:
        return len(self.parents)

    @property
    def n_heads(self) -> int:
        """Heads that draft."""
        return len(self.widths)

    @property
    def is_chain(self) -> bool:
        return all(width == 1 for width in self.widths)

    @cached_property
    def depths(self) -> Tensor:
        """(nodes,)"""
        return torch.tensor(self.depth_of, device=self.device)

    @cached_property
    def choices(self) -> Tensor:
        """(nodes - 1,): where a draft stands in the heads' candidates (heads, widest), flattened."""
        widest = max(self.widths, default=1)
        places = [(self.depth_of[i] - 1) * widest + self.choice_of[i] for i in range(1, self.n_nodes)]
        return torch.tensor(places, dtype=torch.long, device=self.device)

    @cached_property
    def ancestor_bytes(self) -> bytes:
        """``ancestors``, a byte each, row by row."""
        return bytes(self.ancestors.flatten().tolist())

    @cached_property
    def ancestors(self) -> Tensor:
        """(nodes, nodes) bool: row i marks the nodes on the way to node i, itself included."""
        sees = torch.eye(self.n_nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            sees[node] |= sees[parent]
        return sees.to(self.device)

    def follow(self, drafts: list[int], picks: list[int]) -> list[int]:
        """The nodes whose tokens are accepted: from the root on, as long as a child has its parent's pick.

        ``drafts[i - 1]`` is the token of node i, ``picks[i]`` what the model wants after node i.
        """
        path = [0]
        while True:
            wanted = picks[path[-1]]
            for child in self.children[path[-1]]:
                if drafts[child - 1] == wanted:
                    path.append(child)
                    break
            else:
                return path
