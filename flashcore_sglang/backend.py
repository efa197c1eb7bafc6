"""The attention backend that SGLang calls: snapshot -> CSR pager -> attention on segments -> merge.

`init_forward_metadata_out_graph` reads SGLang's tables, once per step and nowhere else, and plans the step;
`forward_decode` and `forward_extend` then run the plan for each layer.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.version import __version__ as sglang_version

from flashcore_sglang import env, ops
from flashcore_sglang.config import cost_model
from flashcore_sglang.device_pager import MAX_ROWS
from flashcore_sglang.gpu_decode import GpuDecode
from flashcore_sglang.gpu_extend import GpuExtend
from flashcore_sglang.layout import CsrLayout, CsrPager, describe_status
from flashcore_sglang.metrics import SampleMetrics, metric_labels
from flashcore_sglang.plugin import NAME, triton_runs
from flashcore_sglang.recording import Recorder
from flashcore_sglang.requirements import LayerFacts, ServingFacts, batch_warning, refusals, version_warning
from flashcore_sglang.statistics import (
    Consumer,
    CpuSampler,
    GpuSampler,
    SampleLog,
    ViolationLog,
    no_sharing_reason,
)

logger = logging.getLogger("flashcore_sglang")
SAMPLE_STEPS = 100
"""Decode steps from one sample to the next where the log wants none and the metrics do."""


def facts_of(model_runner: Any) -> ServingFacts:
    """What decides whether this server can run."""
    args, pool = model_runner.server_args, model_runner.token_to_kv_pool
    device = torch.device(model_runner.device).type
    layers = [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]
    return ServingFacts(
        sglang_version=sglang_version,
        device=device,
        capability="{}.{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else "",
        page_size=model_runner.page_size,
        model_dtype=str(model_runner.dtype).removeprefix("torch."),
        kv_cache_dtype=str(model_runner.kv_cache_dtype).removeprefix("torch."),
        pool_type=type(pool).__name__,
        head_major_pool=bool(getattr(pool, "use_hnd", False)),
        is_mla=model_runner.use_mla_backend,
        is_encoder_decoder=model_runner.model_config.is_encoder_decoder,
        is_hybrid_swa=bool(model_runner.is_hybrid_swa),
        speculative_algorithm=args.speculative_algorithm,
        deterministic=bool(args.enable_deterministic_inference),
        max_requests=model_runner.req_to_token_pool.req_to_token.shape[0] - 1,  # the first row is padding
        serves_prefill=serves_prefill(model_runner),
        context_parallel=max(getattr(args, "dcp_size", 1) or 1, getattr(args, "attn_cp_size", 1) or 1),
        torch_compile=bool(getattr(args, "enable_torch_compile", False)),
        triton_runs=triton_runs(),
        layers=tuple(
            LayerFacts(
                layer_id=x.layer_id,
                num_q_heads=x.tp_q_head_num,
                num_kv_heads=x.tp_k_head_num,
                head_dim=x.qk_head_dim,
                v_head_dim=x.v_head_dim,
                attn_type=getattr(x.attn_type, "value", x.attn_type),
                is_cross_attention=x.is_cross_attention,
                sliding_window_size=x.sliding_window_size,
                has_temperature=getattr(x, "xai_temperature_len", -1) > 0,
                is_chunked_local=bool(x.use_irope and getattr(model_runner, "attention_chunk_size", None)),
                logit_capping_method=x.logit_capping_method if x.logit_cap else "tanh",
                pos_encoding_mode=x.pos_encoding_mode,
            )
            for x in layers
        ),
    )


def serves_prefill(model_runner: Any) -> bool:
    """Whether new tokens come to this backend, too; True where that is not known."""
    args = model_runner.server_args
    names = (getattr(args, "prefill_attention_backend", None), getattr(args, "attention_backend", None))
    return next((name for name in names if name), NAME) == NAME


class FlashCoreSparseBackend(AttentionBackend):
    """``--attention-backend flashcore_sparse``, and ``--decode-attention-backend`` beside another prefill backend.

    Serves decoders with multi-head, grouped-query or multi-query attention, any head dim, KV in float32, bfloat16 or
    float16, page sizes 1, 16, 32, 64 and 128, chunked prefill, mixed batches and logit caps. What it does not serve
    is refused here.

    Raises:
        ValueError: one message with every reason not to serve and its remedy.
        RuntimeError: the pager cannot be compiled (no compiler).
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        facts = facts_of(model_runner)
        if reasons := refusals(facts):
            raise ValueError(f"{NAME} cannot serve this configuration:\n" + "\n".join(f"  - {r}" for r in reasons))
        for warning in filter(None, (version_warning(facts.sglang_version), batch_warning(facts))):
            logger.warning(warning)
        self.device = model_runner.device
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len
        self.page_size = facts.page_size
        self.num_pages = (self.token_to_kv_pool.size + self.page_size) // self.page_size  # page 0 is SGLang's padding
        self.forward_metadata: ops.AttentionPlan | GpuDecode | GpuExtend | None = None
        self._sharing = env.sharing() and not facts.deterministic
        self._gpu = self._make_gpu_decode(facts) if facts.device == "cuda" else None
        self._gpu_extend: GpuExtend | None = None
        if self._gpu and facts.serves_prefill:
            self._gpu_extend = self._make_gpu_extend(facts, self._gpu, model_runner)
        if not self._gpu or facts.serves_prefill:
            _ = self._pager  # compiled now rather than in a request
        args = model_runner.server_args
        reason = no_sharing_reason(
            sharing=env.sharing(),
            deterministic=facts.deterministic,
            radix_cache=not getattr(args, "disable_radix_cache", False),
            pd_decode=getattr(args, "disaggregation_mode", "null") == "decode",
        )
        self._recorder = self._make_recorder(facts)
        interval, consumers = self._make_consumers(model_runner, reason)
        self._statistics = CpuSampler(interval, consumers)
        self._gpu_statistics = GpuSampler(interval, consumers, self._gpu) if self._gpu else None
        self._violations = ViolationLog(logger)
        logger.warning(
            "%s serves on %s with %s: page size %d, %d pages, KV %s, %s",
            NAME,
            self.device,
            self._describe_gpu(self._gpu) if self._gpu else "PyTorch attention over CSR segments",
            self.page_size,
            self.num_pages,
            facts.kv_cache_dtype,
            f"nothing is shared ({reason})" if reason else "prefix sharing on",
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plans the step from a private snapshot of the rows of ``req_to_token`` that it reads."""
        if forward_batch.forward_mode.is_idle():
            self.forward_metadata = None
            return
        decode = forward_batch.forward_mode.is_decode()
        if in_capture and not decode:
            raise ValueError(f"{NAME}: want CUDA graphs of decode only, got {forward_batch.forward_mode.name}")
        if self._gpu and decode and forward_batch.batch_size <= self._gpu.max_rows:
            self._snapshot(self._gpu, forward_batch, in_capture)
            return
        if self._gpu_extend and not decode and forward_batch.batch_size <= self._gpu_extend.max_rows:
            self._plan_extend(self._gpu_extend, forward_batch)
            return
        if in_capture:
            most = f"at most {self._gpu.max_rows} requests" if self._gpu else "none on a CPU"
            raise ValueError(f"{NAME}: CUDA graphs: want {most}, got {forward_batch.batch_size}")
        start = time.perf_counter()
        seq_lens = forward_batch.seq_lens.cpu()
        q_lens = None if decode else forward_batch.extend_seq_lens.cpu()
        layout = self._page(forward_batch.req_pool_indices, seq_lens)
        if layout.status[0]:
            self._report(layout.status)
            seq_lens = _readable_lens(layout, seq_lens)
        self.forward_metadata = ops.plan(layout, seq_lens, q_lens)
        if decode:
            sampled = self._statistics.count(layout, time.perf_counter() - start)
            self._record(forward_batch, sampled)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """On a GPU: the layout and the work list of a decode step, from the snapshot alone."""
        if isinstance(self.forward_metadata, GpuDecode):
            self.forward_metadata.plan()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: the constructor allocated all that a decode step needs, for any batch size."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padded rows: one token, SGLang's padding slot."""
        return 1

    def forward_decode(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """One query token per request; arguments as in SGLang's ``AttentionBackend.forward_decode``."""
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def forward_extend(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """New tokens of each request over its cached prefix, causal; also mixed batches."""
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def _forward(
        self,
        q: torch.Tensor,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        plan = self.forward_metadata
        assert plan is not None, "forward before init_forward_metadata"
        if unknown := sorted(name for name, value in kwargs.items() if name != "sinks" and value is not None):
            raise ValueError(f"{NAME}: want no argument but sinks from the model, got {', '.join(unknown)}")
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, _write_loc(forward_batch), k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        # Per layer, every time: HiCache waits for the layer's pages in these accessors.
        k_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        # Data-parallel attention may pad the tokens; what is past the plan's belongs to no request.
        tokens, padded = plan.num_tokens, q.shape[0]
        new = q.new_empty if tokens == padded else q.new_zeros
        out = new(padded, layer.tp_q_head_num, layer.v_head_dim)
        sinks = kwargs.get("sinks")
        options = {
            "scale": layer.scaling,
            "logit_cap": layer.logit_cap or 0.0,
            "sinks": None if sinks is None else sinks.float(),
        }
        if isinstance(plan, GpuDecode | GpuExtend):
            plan.attend(q[:tokens], k_cache, v_cache, out[:tokens], **options)
        else:
            ops.attend(q[:tokens], k_cache, v_cache, plan, out=out[:tokens], **options)
        return out.view(padded, -1)

    @functools.cached_property
    def _pager(self) -> CsrPager:
        """The CPU's pager: all that the GPU's does not take."""
        return CsrPager(self.page_size, num_pages=self.num_pages, sharing=self._sharing)

    def _make_gpu_decode(self, facts: ServingFacts) -> GpuDecode:
        layer = facts.layers[0]
        table = self.req_to_token_pool.req_to_token
        return GpuDecode(
            page_size=self.page_size,
            num_pages=self.num_pages,
            max_rows=min(MAX_ROWS, table.shape[0]),
            max_tokens=min(table.shape[1], self.num_pages * self.page_size),
            heads=layer.num_q_heads,
            kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            sharing=self._sharing,
            deterministic=facts.deterministic,
            device=self.device,
        )

    def _make_gpu_extend(self, facts: ServingFacts, gpu: GpuDecode, model_runner: Any) -> GpuExtend:
        layer = facts.layers[0]
        chunk = getattr(model_runner.server_args, "chunked_prefill_size", None) or 0
        return GpuExtend(
            gpu.pager,
            heads=layer.num_q_heads,
            kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            max_tokens=chunk if chunk > 0 else 8192,
            device=self.device,
        )

    def _describe_gpu(self, gpu: GpuDecode) -> str:
        if self._gpu_extend is None:
            return f"WGMMA decode ({gpu.mebibytes:.0f} MiB of buffers)"
        return f"WGMMA decode and extend ({gpu.mebibytes + self._gpu_extend.mebibytes:.0f} MiB of buffers)"

    def _make_consumers(self, model_runner: Any, reason: str | None) -> tuple[int, list[Consumer]]:
        """Decode steps from one sample to the next (0: none are taken), and who gets them."""
        consumers: list[Consumer] = []
        if env.log_interval():
            cost = cost_model("hopper" if self._gpu else "cpu")
            consumers.append(SampleLog(logger, cost, reason))
        if labels := metric_labels(model_runner):
            consumers.append(SampleMetrics(labels))
        interval = env.log_interval() or (SAMPLE_STEPS if consumers or self._recorder else 0)
        return interval, consumers

    def _make_recorder(self, facts: ServingFacts) -> Recorder | None:
        path = env.record()
        if not path:
            return None
        itemsize = torch.finfo(getattr(torch, facts.kv_cache_dtype)).bits // 8
        return Recorder(
            path,
            page_size=self.page_size,
            num_pages=self.num_pages,
            token_bytes=sum(x.num_kv_heads * (x.head_dim + x.v_head_dim) * itemsize for x in facts.layers),
            device="hopper" if self._gpu else "cpu",
        )

    def _record(self, forward_batch: Any, sampled: bool) -> None:
        if sampled and self._recorder:
            table = self.req_to_token_pool.req_to_token
            self._recorder.offer(table, forward_batch.req_pool_indices, forward_batch.seq_lens)

    def _plan_extend(self, extend: GpuExtend, forward_batch: Any) -> None:
        """New tokens on a GPU: nothing is read on the host but their number, which SGLang knows."""
        if status := extend.pager.violation():
            self._report(status)
        tokens = getattr(forward_batch, "extend_num_tokens", None)
        if tokens is None:
            tokens = int(forward_batch.extend_seq_lens.sum())
        table, seq_lens = self.req_to_token_pool.req_to_token, forward_batch.seq_lens
        extend.snapshot(table, forward_batch.req_pool_indices, seq_lens)
        extend.plan(seq_lens, forward_batch.extend_seq_lens, tokens)
        self.forward_metadata = extend

    def _snapshot(self, gpu: GpuDecode, forward_batch: Any, in_capture: bool) -> None:
        if status := gpu.pager.violation():
            self._report(status)
        assert self._gpu_statistics is not None
        sampled = not in_capture and self._gpu_statistics.before_snapshot()
        gpu.snapshot(self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens)
        if sampled:
            self._gpu_statistics.after_snapshot(forward_batch.batch_size)
        self._record(forward_batch, sampled)
        self.forward_metadata = gpu

    def _page(self, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> CsrLayout:
        table = self.req_to_token_pool.req_to_token
        if table.device.type == "cpu":
            return self._pager.step(table, req_pool_indices, seq_lens)
        # One copy of the rows in question; entry 0 of the copy stands for SGLang's padding row.
        width = int(seq_lens.max()) if seq_lens.numel() else 0
        wanted = table[req_pool_indices.clamp(0, table.shape[0] - 1), :width]
        rows = torch.cat([table[:1, :width], wanted]).cpu()
        index = torch.arange(1, len(rows)) * (req_pool_indices.cpu() != 0)
        return self._pager.step(rows, index, seq_lens)

    def _report(self, status: tuple[int, int, int, int]) -> None:
        """The request reads the padding page where its table is wrong, and the server goes on."""
        ids, width = f"0 <= slot < {self.num_pages * self.page_size}", self.req_to_token_pool.req_to_token.shape[1]
        self._violations.report(describe_status(status, "req_to_token", "seq_lens", ids, width))


def _write_loc(forward_batch: Any) -> KVWriteLoc:
    """Where this batch's K and V go; from SGLang 0.5.23 on the batch also says in which id space."""
    for_batch = getattr(KVWriteLoc, "for_batch", None)
    return for_batch(forward_batch) if for_batch else KVWriteLoc(forward_batch.out_cache_loc)


def _readable_lens(layout: CsrLayout, seq_lens: torch.Tensor) -> torch.Tensor:
    """Ends of the ranges that the layout covers, where the pager cut some."""
    lens = torch.zeros_like(seq_lens)
    for row in range(layout.num_rows):
        segments = layout.row_segments[layout.row_indptr[row] : layout.row_indptr[row + 1]]
        if segments.numel():
            lens[row] = layout.segment_positions[segments[-1], 1]
    return lens
