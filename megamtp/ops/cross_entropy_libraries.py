"""A chunk of logits into its loss statistics and its gradient, by a library: liger-kernel, or NVIDIA's apex.

To compare with, and where they prove faster: both round a bf16 token's loss to bf16, liger-kernel looks at the targets
from the host, twice a chunk, and apex holds a second chunk for the gradient. Neither knows a split vocabulary.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Library = Literal["liger", "apex"]


def library_losses(name: Library) -> Callable[[Tensor, Tensor], Tensor]:
    """logits (c, V), targets (c,) -> a differentiable loss a token. ``ImportError`` where it is missing."""
    if name == "liger":
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        return lambda logits, targets: LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "none")[0]
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    # Its own mark of an ignored target is 0 by default, which is a token here; no target is -1.
    return lambda logits, targets: SoftmaxCrossEntropyLoss.apply(logits, targets, 0.0, -1, False)


def logits_to_gradient(name: Library, logits: Tensor, places, need_grads: bool) -> tuple[Tensor, Tensor]:
    """logits (c, V) -> ``scale * dloss/dlogits`` in place; losses (c,) in fp32 and correct (c,)."""
    token_losses = library_losses(name)
    target_logit = logits.gather(1, places.index.unsqueeze(1)).squeeze(1)
    correct = places.valid & (target_logit >= logits.amax(1))
    with torch.set_grad_enabled(need_grads):
        leaf = logits.detach().requires_grad_(need_grads)
        losses = token_losses(leaf, places.index)
        if need_grads:
            (gradient,) = torch.autograd.grad(losses, leaf, places.scale.to(losses.dtype))
            logits.copy_(gradient)
    return losses.detach().float().where(places.valid, 0), correct
