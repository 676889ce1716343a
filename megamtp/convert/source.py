"""Open a model, in whatever format: the one way in for conversion, generation and evaluation.

Nothing here imports deepspeed or transformers.
"""

from pathlib import Path

from megamtp.convert.base import Source
from megamtp.convert.from_checkpoint import open_checkpoint, open_run
from megamtp.convert.from_huggingface import open_huggingface
from megamtp.convert.from_meta import open_meta
from megamtp.errors import UserError

__all__ = ["Source", "open_source"]

# What a folder has, and what it is then; the first that fits.
KINDS = (
    ("manifest.json", open_checkpoint),
    ("checkpoints", open_run),
    ("params.json", open_meta),
    ("config.json", open_huggingface),
)


def open_source(path: Path | str) -> Source:
    """The model in the folder ``path``. Names, shapes and sizes are checked; no tensor is read.

    The folder is of a run (its newest checkpoint is taken) or of one checkpoint; of Hugging Face's Llama, exported
    here or foreign; or of Meta's release. ``UserError`` for anything else, and for what is missing, cut or unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'is no folder' if path.exists() else 'is not there'}; give the folder of a model")
    for name, open_kind in KINDS:
        if (path / name).exists():
            return open_kind(path)
    raise UserError(
        f"{path}: no model here; give the folder of a run (checkpoints/), of a checkpoint (manifest.json), of a "
        "Hugging Face Llama (config.json) or of Meta's release (params.json)"
    )
