"""A Llama with n heads for multi-token prediction (arXiv:2404.19737), as remote code of ``transformers``.

The folder that carries this file is a plain Llama (the trunk and head 1, its last layer) and, in a file that the
index of weights does not name, heads 2..n: one decoder layer each, which reads what head 1 reads. All heads share
the final norm, and the unembedding unless ``config.replicated_unembedding`` gives each its own; head k predicts the
k-th next token. ``generate`` uses heads 2..n to draft
tokens, which the next forward verifies: its output is that of the plain Llama, in fewer forwards.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Tested with transformers 4.57.6 and 5.23.0.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import cached_file

EXTRA_HEADS = "extra_heads.safetensors"
EXTRA = ("extra_heads.", "extra_lm_heads.")  # what it holds
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What of a GenerationConfig drafting knows, and what says nothing about how tokens are chosen.
SUPPORTED = {"do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"}
SUPPORTED |= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
PLAIN = "pass draft_heads=0 to generate without drafting"


class MultiTokenLlamaForCausalLM(LlamaForCausalLM):
    """``config.n_future_tokens`` heads; ``forward`` and training are ``LlamaForCausalLM``'s, of head 1 alone.

    ``extra_heads[j]`` is head j + 2, ``extra_lm_heads[j]`` its unembedding where heads have their own. They get no
    gradient from ``forward``: train them with ``multi_token_logits``.
    """

    _auto_class = "AutoModelForCausalLM"  # save_pretrained then copies this file too
    _keys_to_ignore_on_load_missing = [r"^extra_(lm_)?heads\."]  # they come from their own file

    def __init__(self, config):
        super().__init__(config)
        layers = range(config.num_hidden_layers, config.num_hidden_layers + config.n_future_tokens - 1)
        self.extra_heads = nn.ModuleList(LlamaDecoderLayer(config, layer_idx=i) for i in layers)  # i: cache slot
        n_outputs = len(self.extra_heads) if getattr(config, "replicated_unembedding", False) else 0
        outputs = (nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(n_outputs))
        self.extra_lm_heads = nn.ModuleList(outputs)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As ``LlamaForCausalLM.from_pretrained``, then heads 2..n, in the model's dtype and on its device.

        Raises ``OSError`` where the file of the extra heads is missing and ``ValueError`` where it is not this
        model's, or the model is quantized or offloaded.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        if len(model.extra_heads):
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            model._load_extra_heads(cached_file(pretrained_model_name_or_path, EXTRA_HEADS, **hub))
        return loaded

    def _load_extra_heads(self, path: str) -> None:
        wanted = {name: value for name, value in self.named_parameters() if name.startswith(EXTRA)}
        if getattr(self, "hf_quantizer", None) is not None or any(value.is_meta for value in wanted.values()):
            raise ValueError("extra heads cannot be quantized or offloaded: load the model whole, or as a plain Llama")
        try:
            with safe_open(path, framework="pt") as file:
                if differ := sorted(wanted.keys() ^ set(file.keys())):
                    raise ValueError(f"{path}: {differ[0]} is {'missing' if differ[0] in wanted else 'unknown'}")
                for name, parameter in wanted.items():
                    value = file.get_tensor(name)
                    if value.shape != parameter.shape:
                        shapes = f"{tuple(value.shape)}; the config says {tuple(parameter.shape)}"
                        raise ValueError(f"{path}: {name} has shape {shapes}")
                    parameter.data.copy_(value)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """A folder as described at the top: it loads with this file or as a plain Llama. Weights are safetensors.

        Raises ``ValueError`` for ``push_to_hub`` (upload the folder, or call ``model.push_to_hub``), ``variant``,
        ``safe_serialization=False``, ``distributed_checkpoint``, PEFT adapters, a state_dict without extra heads.
        """
        refused = [name for name in ("push_to_hub", "variant", "distributed_checkpoint") if kwargs.get(name)]
        refused += [] if kwargs.get("safe_serialization", True) else ["safe_serialization=False"]
        refused += ["a PEFT adapter"] if getattr(self, "_hf_peft_config_loaded", False) else []
        state = self.state_dict() if state_dict is None else state_dict
        extra = {name: value.contiguous() for name, value in state.items() if name.startswith(EXTRA)}
        refused += [] if extra or not len(self.extra_heads) else ["a state_dict that lacks the extra heads"]
        if refused:
            raise ValueError(f"a multi-token model is not saved with {', '.join(refused)}")
        folder, whole = Path(save_directory), Path(save_directory, "model.safetensors")
        if is_main_process:
            whole.unlink(missing_ok=True)  # where there is one it is read first, and shards are not
        plain = {name: value for name, value in state.items() if name not in extra}
        total_size = sum(value.nbytes for value in plain.values())
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=plain, **kwargs)
        if not is_main_process:
            return
        # Always an index: where there is one, servers load what it names and no other file of weights.
        if whole.exists():
            shard = whole.rename(folder / "model-00001-of-00001.safetensors")
            with safe_open(shard, framework="pt") as file:
                weight_map = dict.fromkeys(sorted(file.keys()), shard.name)
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if extra:
            save_file(extra, folder / EXTRA_HEADS, metadata={"format": "pt"})
        self.config.architectures = ["LlamaForCausalLM"]  # for who loads it without this file
        self.config.save_pretrained(save_directory)

    def resize_token_embeddings(self, *args, **kwargs):
        """As ``LlamaForCausalLM``'s; ``ValueError`` where heads have unembeddings of their own, which it leaves out."""
        if len(self.extra_lm_heads):
            raise ValueError("heads with unembeddings of their own keep their vocabulary: resize the plain Llama")
        return super().resize_token_embeddings(*args, **kwargs)

    def multi_token_logits(self, input_ids: Tensor, attention_mask=None, position_ids=None) -> Tensor:
        """Logits (n, b, s, V) of all heads, head 1 first. ``input_ids``, ``attention_mask``, ``position_ids`` (b, s).

        Without ``position_ids`` a sequence's positions count its tokens, from its first that is not masked.
        Raises ``ValueError`` for an attention other than sdpa and eager, or a mask of another shape.
        """
        visible = _visible(input_ids, attention_mask)
        z, context = self._trunk(input_ids, visible, _positions(visible) if position_ids is None else position_ids)
        heads = (self.model.layers[-1], *self.extra_heads)
        return torch.stack([self._logits(_apply(head, z, context), k) for k, head in enumerate(heads)])

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *, draft_heads=None, streamer=None, **kwargs):
        """``LlamaForCausalLM.generate`` with ``draft_heads`` (0..n - 1, default n - 1) tokens drafted a forward.

        ``inputs`` or ``input_ids`` (b, s), padded on the left where ``attention_mask`` (b, s) is 0 -> (b, s + new).
        Greedy: the same tokens. Sampling with temperature, top_k and top_p: tokens of the same distribution, by the
        rejection rule of speculative sampling (arXiv:2302.01318). ``draft_heads=0`` is the ordinary ``generate``
        with all its options; otherwise an option that drafting does not know raises ``ValueError``.
        """
        n_extra = len(self.extra_heads)
        draft_heads = n_extra if draft_heads is None else draft_heads
        if not 0 <= draft_heads <= n_extra:
            raise ValueError(f"draft_heads is {draft_heads}; this model has {n_extra} heads that can draft")
        if draft_heads == 0:
            return super().generate(inputs, generation_config, streamer=streamer, **kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        attention_mask = kwargs.pop("attention_mask", None)
        limits = [source.max_length for source in (generation_config, self.generation_config) if source is not None]
        has_max_length = kwargs.get("max_length") or set(limits) - {None, GenerationConfig().max_length}
        config, others = self._prepare_generation_config(generation_config, **kwargs)
        self._check_supported(input_ids, config, others, streamer)
        pad, eos = config.pad_token_id, _ids(config.eos_token_id)
        if attention_mask is None and pad is not None and pad not in eos:  # as transformers infers it
            attention_mask = input_ids != pad
        visible = _visible(input_ids, attention_mask)
        if not visible[:, -1].all():
            raise ValueError("prompts must be padded on the left (tokenizer.padding_side = 'left')")
        prompt_length, max_new_tokens = input_ids.shape[1], config.max_new_tokens
        if max_new_tokens is None and has_max_length:
            max_new_tokens = config.max_length - prompt_length
        elif max_new_tokens is None:  # transformers' default is so many new tokens
            max_new_tokens = min(config.max_length, self.config.max_position_embeddings - prompt_length)
        if max_new_tokens < 1:
            raise ValueError(f"nothing to generate: the prompt has {prompt_length} tokens; set max_new_tokens")
        rows = self._generate_rows(input_ids, visible, max_new_tokens, eos, draft_heads, _warpers(config), streamer)
        pad = (eos[0] if eos else 0) if pad is None else pad
        width = max(map(len, rows))
        new = [row + [pad] * (width - len(row)) for row in rows]
        return torch.cat((input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)), dim=1)

    def _check_supported(self, input_ids, config, others: dict, streamer) -> None:
        if input_ids is None or input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"drafting needs input_ids (b, s) that are not empty; {PLAIN}")
        off = GenerationConfig()
        off.update(**getattr(off, "_get_default_generation_params", dict)())  # transformers 5 keeps defaults there
        asked = {name for name, value in others.items() if not (value is None or value is False or value == [])}
        for name, value in vars(config).items():
            default = getattr(off, name, None)
            is_off = value is None or value == default or (value is False and not default)
            if not (is_off or name in SUPPORTED or name.startswith("_")):
                asked.add(name)
        if streamer is not None and len(input_ids) > 1:
            asked.add("streamer for more than one sequence")
        if len(set((getattr(self, "hf_device_map", None) or {}).values())) > 1:
            asked.add("a model on several devices")
        if asked:
            raise ValueError(f"drafting does not support {', '.join(sorted(asked))}; {PLAIN}")
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(f"gradient checkpointing keeps no cache in training: call model.eval(), or {PLAIN}")

    def _generate_rows(
        self, input_ids, visible, max_new_tokens, eos, draft_heads, warpers, streamer
    ) -> list[list[int]]:
        """The new tokens of each sequence, the end-of-sequence token included. ``warpers`` None: greedy.

        A block is what one forward computes: the token that was last chosen and the drafts after it. Sequences
        accept different numbers of drafts; the slots of rejected ones stay in the cache, invisible, up to the
        longest accepted block of the batch.
        """
        cache, rows = DynamicCache(), [[] for _ in input_ids]
        index = torch.arange(len(rows), device=input_ids.device)
        unfinished = set(range(len(rows)))
        block, drafts, positions = input_ids, input_ids[:, :0], _positions(visible)
        draft_scores = torch.zeros(*drafts.shape, self.vocab_size, device=input_ids.device)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        while True:
            z, context = self._trunk(block, visible, positions, cache)
            n_drafts = drafts.shape[1]
            hidden = _apply(self.model.layers[-1], z, context)[:, -(n_drafts + 1) :]
            scores = _warped(self._logits(hidden), warpers)
            accepted, chosen = (_verify_greedily if warpers is None else _verify)(scores, drafts, draft_scores)
            tokens = torch.cat((drafts, chosen[:, None]), dim=1)
            tokens[index, accepted] = chosen
            counts, tokens = accepted.tolist(), tokens.tolist()
            used = 0
            for i in sorted(unfinished):
                used = max(used, counts[i])
                for token in tokens[i][: counts[i] + 1]:
                    rows[i].append(token)
                    if streamer is not None:
                        streamer.put(torch.tensor([token]))
                    if token in eos or len(rows[i]) == max_new_tokens:
                        unfinished.remove(i)
                        break
            if not unfinished:
                break
            # A head that is left out here lacks these positions in its cache: it never comes back, since the number
            # of tokens still to generate does not grow.
            n_next = min(draft_heads, max_new_tokens - min(len(rows[i]) for i in unfinished) - 1)
            last = block.shape[1] - 1 - n_drafts + accepted  # the block's last position that was accepted
            hidden = [_apply(head, z, context)[index, last] for head in self.extra_heads[:n_next]]
            hidden = torch.stack(hidden, dim=1) if hidden else z[:, :0]
            draft_scores = _warped(self._draft_logits(hidden), warpers)
            visible[:, visible.shape[1] - n_drafts :] = torch.arange(n_drafts, device=index.device) < accepted[:, None]
            if used < n_drafts:
                cache.crop(used - n_drafts)  # negative: so many slots less
                visible = visible[:, : used - n_drafts]
            drafts = draft_scores.argmax(-1) if warpers is None else _sample(draft_scores.softmax(-1))
            block = torch.cat((chosen[:, None], drafts), dim=1)
            visible = torch.cat((visible, torch.ones_like(block, dtype=torch.bool)), dim=1)
            positions = positions[index, last][:, None] + 1 + torch.arange(block.shape[1], device=index.device)
        if streamer is not None:
            streamer.end()
        return rows

    def _trunk(self, tokens: Tensor, visible: Tensor, positions: Tensor, cache=None) -> tuple[Tensor, dict]:
        """z (b, m, d) of m tokens and what every layer is called with. ``visible`` (b, slots), these tokens' last."""
        if self.config._attn_implementation not in ("sdpa", "eager"):  # those that take any mask
            raise ValueError(f"heads need attn_implementation='sdpa' or 'eager' (in generate: or {PLAIN})")
        hidden = self.model.embed_tokens(tokens)
        (m, slots), dtype = (tokens.shape[1], visible.shape[1]), hidden.dtype
        sees = visible[:, None] & torch.ones(m, slots, dtype=torch.bool, device=visible.device).tril(slots - m)
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        context = {
            "attention_mask": mask[:, None],
            "position_ids": positions,
            "position_embeddings": self.model.rotary_emb(hidden, positions),
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        for layer in self.model.layers[:-1]:
            hidden = _apply(layer, hidden, context)
        return hidden, context

    def _logits(self, hidden: Tensor, k: int = 0) -> Tensor:
        """What the 0-based head k makes of its layer's output."""
        output = self.extra_lm_heads[k - 1] if k and len(self.extra_lm_heads) else self.lm_head
        return output(self.model.norm(hidden))

    def _draft_logits(self, hidden: Tensor) -> Tensor:
        """hidden (b, m, d) of heads 2..m + 1 -> (b, m, V)."""
        if not len(self.extra_lm_heads) or not hidden.shape[1]:
            return self._logits(hidden)  # one product for all
        return torch.stack([self._logits(x, k) for k, x in enumerate(hidden.unbind(1), start=1)], dim=1)


def _apply(layer: nn.Module, hidden: Tensor, context: dict) -> Tensor:
    output = layer(hidden, **context)
    return output if isinstance(output, Tensor) else output[0]  # older versions return a tuple


def _visible(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; input_ids are {tuple(input_ids.shape)}")
    return attention_mask.to(input_ids.device).bool()


def _positions(visible: Tensor) -> Tensor:
    return (visible.long().cumsum(1) - 1).clamp(min=0)


def _ids(ids) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def _warpers(config: GenerationConfig) -> LogitsProcessorList | None:
    """What transformers applies before it samples, in its order; None for greedy decoding."""
    if not config.do_sample:
        return None
    warpers = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k not in (None, 0):
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


def _warped(logits: Tensor, warpers: LogitsProcessorList | None) -> Tensor:
    logits = logits.float()  # as transformers does: ties are the same
    return logits if not warpers or not logits.numel() else warpers(None, logits.flatten(0, -2)).view_as(logits)


def _verify_greedily(scores: Tensor, drafts: Tensor, _) -> tuple[Tensor, Tensor]:
    best = scores.argmax(-1)
    accepted = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None]).squeeze(1)


def _verify(scores: Tensor, drafts: Tensor, draft_scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores (b, d + 1, V) of head 1, drafts (b, d) from draft_scores (b, d, V) -> accepted (b,), next token (b,).

    A draft is accepted with probability min(1, p / q); at the first rejection the token comes from max(p - q, 0),
    after d acceptances from p: the tokens are then distributed as p, whatever q is.
    """
    p, q = scores.softmax(-1), draft_scores.softmax(-1)
    p_draft, q_draft = (x[:, : drafts.shape[1]].gather(2, drafts[..., None]).squeeze(2) for x in (p, q))
    accepted = (torch.rand_like(p_draft) * q_draft < p_draft).long().cumprod(1).sum(1)
    index = torch.arange(len(p), device=p.device)
    p, q = p[index, accepted], nn.functional.pad(q, (0, 0, 0, 1))[index, accepted]  # q = 0 after the last draft
    rest = (p - q).clamp(min=0)
    # Rounding alone can reject where p = q; nothing is left then.
    return accepted, _sample(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))


def _sample(probabilities: Tensor) -> Tensor:
    """(..., V) -> (...)."""
    if not probabilities.numel():
        return probabilities.new_zeros(probabilities.shape[:-1], dtype=torch.long)
    return torch.multinomial(probabilities.flatten(0, -2), 1).view(probabilities.shape[:-1])
