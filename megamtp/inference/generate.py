"""Load a trained model and continue a text with head 1, the next-token head.

Each new token recomputes its prefix: fit for a look at a small model, not for serving.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from megamtp.config import from_dict
from megamtp.errors import UserError
from megamtp.model.model import MultiTokenModel, build_model, logical_parameters
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint
from megamtp.training.run_config import RunConfig


class TrainedRun(NamedTuple):
    model: MultiTokenModel  # fp32, without gradients
    config: RunConfig
    checkpoint: Checkpoint


def load_run(run_dir: Path | str) -> TrainedRun:
    """The newest checkpoint of a run folder. Raises ``UserError`` for a folder that is no run or has none yet."""
    run_dir = Path(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: no config.yaml; give the run_dir of a training run")
    config = from_dict(RunConfig, yaml.safe_load(path.read_text()), str(path))
    latest = latest_checkpoint(run_dir / "checkpoints")
    if latest is None:
        raise UserError(f"{run_dir}: no checkpoint yet; train on, or lower training.checkpoint_every")
    checkpoint = Checkpoint.open(latest)
    checkpoint.verify()
    model = build_model(config.model, ops=config.ops, seed=None).requires_grad_(False)
    for name, parameter in logical_parameters(model):
        parameter.copy_(checkpoint.tensor(name))
    return TrainedRun(model, config, checkpoint)


@torch.no_grad()
def generate(
    model: MultiTokenModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    context: int,
    temperature: float = 0.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue ``prompt`` (t,) int64: returns the new tokens (at most ``max_new_tokens``,), the stop token excluded.

    Temperature 0 is greedy. Only the last ``context`` tokens are seen. Raises ``ValueError`` for an empty prompt.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty: the model needs at least one token to continue")
    tokens = prompt
    for _ in range(max_new_tokens):
        z, inputs = model.trunk(tokens[None, -context:])
        hidden = model.output_heads.hidden(0, z, inputs)[0, -1]
        logits = (model.output_heads.unembedding @ hidden).float()  # (V,)
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(keepdim=True)
        if stop_token is not None and token.item() == stop_token:
            break
        tokens = torch.cat([tokens, token])
    return tokens[prompt.numel() :]
