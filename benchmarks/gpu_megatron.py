"""Forward and backward of megatron-core's multi-token prediction, for ``gpu.py`` to compare with where it is installed.

Its heads are DeepSeek's: one after another, each a transformer layer over a projection of the one before and of the
next token's embedding; so at equal layers it computes a little more than ours. The update is left out here, and is in
our figure.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.distributed as dist


def megatron_step(
    *,
    dim: int,
    n_trunk_layers: int,
    n_heads: int,
    ffn_dim: int,
    vocab: int,
    seq_len: int,
    n_future_tokens: int,
    micro_batch: int,
    micro_batches: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Callable[[], None], str]:
    """(a step, which layers it is made of): the trunk and head 1, then ``n_future_tokens - 1`` MTP layers."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=n_trunk_layers + 1,
        hidden_size=dim,
        num_attention_heads=n_heads,
        ffn_hidden_size=ffn_dim,
        mtp_num_layers=n_future_tokens - 1 or None,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=device.type == "cpu",
    )
    has_engine = find_spec("transformer_engine") is not None
    if has_engine:
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=has_engine) if n_future_tokens > 1 else None
    model = GPTModel(
        config,
        spec,
        vocab_size=vocab,
        max_sequence_length=seq_len,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp,
    ).to(device, dtype)
    tokens = torch.randint(vocab, (micro_batches, micro_batch, seq_len), device=device)
    positions = torch.arange(seq_len, device=device).expand(micro_batch, -1)
    mask = None if has_engine else torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).triu(1)[None, None]

    def step() -> None:
        for batch in tokens:
            model(batch, positions, mask, labels=batch).mean().backward()

    return step, "Transformer Engine" if has_engine else "PyTorch"
