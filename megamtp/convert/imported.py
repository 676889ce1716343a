"""``imported.json`` in a run folder that was made from other weights: what an export of them needs to be the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamtp.errors import UserError
from megamtp.files import write_atomic

NAME = "imported.json"
FORMAT = {"format": "megamtp-imported", "version": 1}
TOKENIZER = "tokenizer"  # the folder with the tokenizer's files


@dataclass(frozen=True)
class Imported:
    """``origin`` is the name of the folder that the weights are from."""

    origin: str
    dtype: torch.dtype
    context: int | None
    eos_id: int | None
    facts: dict[str, Any]

    @classmethod
    def read(cls, run_dir: Path) -> "Imported | None":
        """None where the run was not imported. ``UserError`` for a file that cannot be read."""
        path = run_dir / NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            if not FORMAT.items() <= values.items():
                raise ValueError(f"is not {FORMAT}")
            dtype = getattr(torch, values["dtype"])
            return cls(values["origin"], dtype, values["context"], values["eos_id"], values["facts"])
        except (AttributeError, KeyError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error!r}; import again") from None

    def write(self, run_dir: Path) -> None:
        values = {**FORMAT, **vars(self), "dtype": dtype_name(self.dtype)}
        write_atomic(run_dir / NAME, (json.dumps(values, indent=2) + "\n").encode())

    def tokenizer(self, run_dir: Path) -> Path | None:
        """Where the import put the tokenizer."""
        return run_dir / TOKENIZER if (run_dir / TOKENIZER).is_dir() else None


def dtype_name(dtype: torch.dtype) -> str:
    """As configs of Hugging Face write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
