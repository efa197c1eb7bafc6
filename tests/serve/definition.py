"""An attention backend that computes ``reference.extend`` for every layer: slow, and all that its numbers mean."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from flashcore_sglang import reference
from flashcore_sglang.step import read_step


class Definition(AttentionBackend):
    """For decode and extend, with windows, sinks and logit caps, in one pool or two."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.token_to_kv_pool, self.req_to_token_pool = model_runner.token_to_kv_pool, model_runner.req_to_token_pool
        self.page_size, self.forward_metadata = model_runner.page_size, None
        self.max_context_len = model_runner.model_config.context_len
        self.chunk = getattr(model_runner, "attention_chunk_size", None)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.forward_metadata = read_step(forward_batch)

    def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward_extend(*args, **kwargs)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        pool, loc, table = self.token_to_kv_pool, forward_batch.out_cache_loc, self.req_to_token_pool.req_to_token
        mapping = getattr(pool, "layers_mapping", {}).get(layer.layer_id, (0, False))[1]
        window_loc = pool.translate_loc_from_full_to_swa(loc) if hasattr(pool, "swa_kv_pool") else None
        if save_kv_cache and k is not None:
            physical = {"physical": True} if hasattr(KVWriteLoc, "for_batch") else {}
            pool.set_kv_buffer(layer, KVWriteLoc(loc, window_loc, **physical), k, v)
        if mapping:
            table = pool.translate_loc_from_full_to_swa(table.long())
        step, sinks = self.forward_metadata, kwargs.get("sinks")
        q_lens = torch.ones_like(step.seq_lens) if step.q_lens is None else step.q_lens
        out = reference.extend(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).cpu(),
            pool.get_key_buffer(layer.layer_id).cpu(),
            pool.get_value_buffer(layer.layer_id).cpu(),
            table.cpu(),
            step.req_pool_indices.cpu(),
            step.seq_lens.cpu(),
            q_lens.cpu(),
            page_size=self.page_size,
            scale=layer.scaling,
            logit_cap=layer.logit_cap or 0.0,
            sinks=None if sinks is None else sinks.cpu(),
            window_left=layer.sliding_window_size,
            chunk=(self.chunk or 0) if layer.use_irope else 0,
        )
        return out.to(q.dtype).to(q.device).flatten(1)
