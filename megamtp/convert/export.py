"""Out: any source becomes a folder of Hugging Face, a plain Llama with the other heads beside it.

The index of weights does not name the file of heads 2..n, so that loaders of a plain Llama never see them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from megamtp.convert.base import Source
from megamtp.convert.formats import LLAMA, extra_head
from megamtp.convert.from_huggingface import CONFIG, EXTRA_HEADS, INDEX, OWN, OWN_FORMAT, own_record, read_json
from megamtp.convert.huggingface import llama_config_dict
from megamtp.convert.imported import dtype_name
from megamtp.convert.model_card import model_card
from megamtp.convert.output import new_folder
from megamtp.convert.safetensors_file import Spec
from megamtp.convert.source import open_source
from megamtp.convert.stream import Item, Progress, shards, write_items
from megamtp.convert.tokenizer_files import write_tokenizer
from megamtp.convert.verification import verifying
from megamtp.errors import UserError

METADATA = {"format": "pt"}  # transformers asks for it
REMOTE_CODE = Path(__file__).with_name("modeling_megamtp.py")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    source_path: Path | str,
    output: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: Path | str | None = None,
    context: int | None = None,
    shard_bytes: int = 4 * 10**9,
    force: bool = False,
) -> None:
    """Write the folder ``output``. ``tokenizer`` and ``context`` override the source's.

    Raises ``UserError`` for a source or an output that does not do, damage that checksums tell included, and
    ``RunFailure`` where the disk fails; ``output`` is complete or as it was.
    """
    source, output = open_source(source_path), Path(output)
    config, n = source.config, source.config.n_future_tokens
    context, tokenizer = context or source.context, tokenizer or source.tokenizer
    items = [Item(Spec(theirs, dtype, source.shape(name)), name) for name, theirs in LLAMA.names(config).items()]
    plain = shards([item for item in items if not extra_head(item.name)], shard_bytes)
    extra = [item for item in items if extra_head(item.name)]
    n_bytes = sum(item.spec.n_bytes for item in items)
    n_check = sum(check.n_bytes for check in source.checks())
    with new_folder(output, force, is_export, source.path, n_bytes) as folder:
        # What is small and may be refused comes first.
        files = write_tokenizer(tokenizer, folder, vocab_size=config.vocab_size, eos_id=source.eos_id, context=context)
        write_json(folder / CONFIG, config_json(source, context, dtype))
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": None, "eos_token_id": source.eos_id, "pad_token_id": None},
        )
        write_json(folder / OWN, own_record(config, context, source.eos_id, source.facts))
        (folder / "README.md").write_text(
            model_card(config, context, source.facts, dtype_name(dtype), has_tokenizer=bool(files))
        )
        if n > 1:
            shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
        progress = Progress(n_bytes + n_check, "writing and verifying" if n_check else "writing")
        try:
            with verifying(source, progress.add) as verification:
                weight_map: dict[str, str] = {}
                for i, shard in enumerate(plain, start=1):
                    name = f"model-{i:05d}-of-{len(plain):05d}.safetensors"
                    write_items(folder / name, shard, source, progress, verification, METADATA)
                    weight_map |= {item.spec.name: name for item in shard}
                if extra:
                    write_items(folder / EXTRA_HEADS, extra, source, progress, verification, METADATA)
                total = sum(item.spec.n_bytes for shard in plain for item in shard)
                write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
                verification.wait()
        finally:
            progress.close()


def config_json(source: Source, context: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json``, for transformers 4 and 5."""
    config = source.config
    values: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    values |= llama_config_dict(config)
    if context is not None:
        values["max_position_embeddings"] = context
    # Left out, they would be 1 and 2.
    values |= {"bos_token_id": None, "eos_token_id": source.eos_id, "pad_token_id": None}
    values["torch_dtype"] = dtype_name(dtype)
    if config.n_future_tokens > 1:
        values["n_future_tokens"] = config.n_future_tokens
        values["auto_map"] = {"AutoModelForCausalLM": f"{REMOTE_CODE.stem}.MultiTokenLlamaForCausalLM"}
    if config.replicated_unembedding:
        values["replicated_unembedding"] = True
    return values


def is_export(folder: Path) -> bool:
    """Whether ``folder`` is the output of an export, which another may replace."""
    return (folder / OWN).is_file() and OWN_FORMAT.items() <= read_json(folder / OWN).items()


def parse_size(text: str) -> int:
    """``4GB``, ``500MB`` or a number of bytes; decimal units, as transformers has them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|KB|MB|GB)", text.strip().upper())
    if not found or (size := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise UserError(f"--shard-size {text!r}: is no size; write 4GB or 500MB")
    return size


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
