"""The attention backend that SGLang calls: snapshot -> CSR pager -> attention on segments -> merge.

`init_forward_metadata_out_graph` reads SGLang's tables, once per step and nowhere else, and plans the step;
`forward_decode` and `forward_extend` then run the plan for each layer.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from flashcore_sglang import env
from flashcore_sglang.config import cost_model
from flashcore_sglang.cpu_attention import CpuAttention, CpuStep
from flashcore_sglang.facts import facts_of, largest_batch
from flashcore_sglang.gpu_attention import GpuAttention, GpuStep
from flashcore_sglang.gpu_decode import Scale
from flashcore_sglang.layout import describe_status
from flashcore_sglang.metrics import SampleMetrics, metric_labels
from flashcore_sglang.plugin import NAME
from flashcore_sglang.recording import Recorder
from flashcore_sglang.requirements import E4M3, ServingFacts, batch_warning, refusals, version_warning
from flashcore_sglang.statistics import (
    Consumer,
    CpuSampler,
    GpuSampler,
    SampleLog,
    ViolationLog,
    no_sharing_reason,
)
from flashcore_sglang.step import Drafts, Step, read_step

logger = logging.getLogger("flashcore_sglang")
SAMPLE_STEPS = 100
"""Decode steps from one sample to the next where the log wants none and the metrics do."""


class FlashCoreSparseBackend(AttentionBackend):
    """``--attention-backend flashcore_sparse``, and ``--decode-attention-backend`` beside another prefill backend.

    Serves decoders with multi-head, grouped-query or multi-query attention, any head dim, KV in float32, bfloat16,
    float16 or float8_e4m3fn, page sizes 1, 16, 32, 64 and 128, sliding windows, logit caps and sinks; chunked prefill,
    mixed batches, and the verification of drafts. What it does not serve is refused here. The steps of draft models are
    in ``draft_backend``.

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
        self._scaled = facts.kv_cache_dtype == E4M3
        self.num_pages = self._pages_of(self.token_to_kv_pool.size)
        self.forward_metadata: CpuStep | GpuStep | None = None
        self.facts = facts
        self._sharing = env.sharing() and not facts.deterministic
        self._window_loc: torch.Tensor | None = None
        self._static_window_loc: torch.Tensor | None = None
        self._gpu = self._make_gpu(model_runner) if facts.device == "cuda" else None
        if not self._gpu or facts.serves_prefill:
            _ = self._cpu  # compiled now rather than in a request
        args = model_runner.server_args
        pd_decode = getattr(args, "disaggregation_mode", "null") == "decode"
        # Asked by both names: 0.5.23 keeps what it makes of the second apart from the arguments.
        cached = not pd_decode or getattr(args, "disaggregation_decode_enable_radix_cache", False)
        reason = no_sharing_reason(
            sharing=env.sharing(),
            deterministic=facts.deterministic,
            radix_cache=cached and not getattr(args, "disable_radix_cache", False),
            pd_decode=pd_decode,
        )
        self._recorder = self._make_recorder(facts)
        interval, consumers = self._make_consumers(model_runner, reason)
        self._statistics = CpuSampler(interval, consumers)
        full = self._gpu.full if self._gpu else None
        self._gpu_statistics = GpuSampler(interval, consumers, full) if full else None
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
        self.forward_metadata = None
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if in_capture and not (mode.is_decode() or mode.is_target_verify() or mode.is_draft_extend_v2()):
            raise ValueError(f"{NAME}: want CUDA graphs of decode and drafts only, got {mode.name}")
        step = read_step(forward_batch)
        self._translate_out_cache_loc(forward_batch)
        if self._gpu and self._gpu.serves(step):
            self.forward_metadata = self._snapshot(self._gpu, step, in_capture)
            return
        if in_capture:
            most = f"at most {self._gpu.max_rows} requests" if self._gpu else "none on a CPU"
            raise ValueError(f"{NAME}: CUDA graphs: want {most}, got {forward_batch.batch_size}")
        start = time.perf_counter()
        self.forward_metadata = self._cpu.plan(step, self.req_to_token_pool.req_to_token, self._slot_map)
        if step.is_decode:
            sampled = self._statistics.count(self.forward_metadata.layout, time.perf_counter() - start)
            self._record(step, sampled)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """On a GPU: the layouts and the work lists of a step, from the snapshot alone."""
        if isinstance(self.forward_metadata, GpuStep):
            self.forward_metadata.plan()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """What captured steps need beside the buffers that the constructor allocated for any batch size."""
        if self._slot_map is not None:
            self._static_window_loc = torch.zeros(max_num_tokens, dtype=torch.int64, device=self.device)
        trees = self.facts.draft_branches > 1 or self.facts.speculative_algorithm == "NGRAM"
        if self._gpu and self.facts.draft_tokens and trees and not self.facts.draft_steps:
            self._gpu.make_mask(max_bs)

    def plan_drafts(self, drafts: Drafts) -> Sequence[CpuStep | GpuStep]:
        """Each step of a draft model, from one private snapshot of the rows of ``req_to_token``."""
        table = self.req_to_token_pool.req_to_token
        if not self._gpu:
            return self._cpu.plan_drafts(drafts, table)
        self._report_violation(self._gpu)
        return self._gpu.snapshot_drafts(drafts, table)

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Where a step was planned before its drafts were there: takes their mask. Plans depend on lengths alone."""
        if self._gpu and spec_info.custom_mask is not None:
            self._gpu.take_mask(spec_info.custom_mask)

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
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if unknown := sorted(given - {"sinks"}):
            raise ValueError(f"{NAME}: want no argument but sinks from the model, got {', '.join(unknown)}")
        k_scale, v_scale = self._scales(layer)
        if save_kv_cache and k is not None and v is not None:
            # Divided here: the pool would divide the caller's own K and V.
            k, v = _divided(k, k_scale), _divided(v, v_scale)
            self.token_to_kv_pool.set_kv_buffer(layer, self._write_loc(forward_batch), k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        # Per layer, every time: HiCache waits for the layer's pages in these accessors.
        k_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        # Data-parallel attention may pad the tokens; what is past the plan's belongs to no request.
        tokens = plan.num_tokens
        out = _output(forward_batch, q, layer)
        out[tokens:].zero_()
        sinks = kwargs.get("sinks")
        options = {
            "scale": layer.scaling,
            "logit_cap": layer.logit_cap or 0.0,
            "sinks": None if sinks is None else sinks.float(),
            "k_scale": k_scale,
            "v_scale": v_scale,
        }
        if isinstance(plan, GpuStep):
            plan.attend(layer.layer_id, q[:tokens], k_cache, v_cache, out[:tokens], **options)
        else:
            self._cpu.attend(plan, layer.layer_id, q[:tokens], k_cache, v_cache, out[:tokens], **options)
        return out.flatten(1)

    def _write_loc(self, forward_batch: Any) -> KVWriteLoc:
        """Where this batch's K and V go; from SGLang 0.5.23 on the batch also says in which id space."""
        for_batch = getattr(KVWriteLoc, "for_batch", None)
        if for_batch:
            return for_batch(forward_batch, swa_loc=self._window_loc)
        return KVWriteLoc(forward_batch.out_cache_loc, self._window_loc)

    def _translate_out_cache_loc(self, forward_batch: Any) -> None:
        """Where K and V of layers with a window go, in their pool; captured steps read it in one place."""
        slot_map, loc = self._slot_map, getattr(forward_batch, "out_cache_loc", None)
        if slot_map is None or loc is None:
            self._window_loc = None
            return
        translated, static = self.token_to_kv_pool.translate_loc_from_full_to_swa(loc), self._static_window_loc
        if static is None or len(loc) > len(static):
            self._window_loc = translated
            return
        static[len(loc) :] = 0  # what pads a captured batch goes to SGLang's padding slot
        static[: len(loc)] = translated
        self._window_loc = static[: len(loc)]

    @property
    def _slot_map(self) -> torch.Tensor | None:
        """[slots] where layers with a window keep each slot of the full pool; None: there is one pool."""
        return getattr(self.token_to_kv_pool, "full_to_swa_index_mapping", None)

    def _pages_of(self, slots: int) -> int:
        return (slots + self.page_size) // self.page_size  # page 0 is SGLang's padding

    def _scales(self, layer: Any) -> tuple[Scale, Scale]:
        """Of K and V in this layer's cache. SGLang scales nothing but what it stores in a narrower type."""
        if not self._scaled:
            return None, None
        return getattr(layer, "k_scale", None), getattr(layer, "v_scale", None)

    @functools.cached_property
    def _cpu(self) -> CpuAttention:
        """In PyTorch: all that the kernels do not take."""
        return CpuAttention(
            self.facts.layers,
            page_size=self.page_size,
            num_pages=self.num_pages,
            sharing=self._sharing,
            report=self._report,
        )

    def _make_gpu(self, model_runner: Any) -> GpuAttention:
        chunk = getattr(model_runner.server_args, "chunked_prefill_size", None) or 0
        context = self.req_to_token_pool.req_to_token.shape[1]
        return GpuAttention(
            self.facts,
            num_pages=self.num_pages,
            window_pages=self._pages_of(getattr(self.token_to_kv_pool, "size_swa", 0)),
            max_batch=largest_batch(model_runner),
            max_context=context,
            max_extend=chunk if chunk > 0 else 8192,
            sharing=self._sharing,
            device=self.device,
            branches=self.facts.draft_branches if self.facts.draft_steps else 1,
        )

    def _describe_gpu(self, gpu: GpuAttention) -> str:
        extend = " and extend" if self.facts.serves_prefill else ""
        return f"WGMMA decode{extend} ({gpu.mebibytes:.0f} MiB of buffers)"

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

    def _record(self, step: Step, sampled: bool) -> None:
        if sampled and self._recorder:
            self._recorder.offer(self.req_to_token_pool.req_to_token, step.req_pool_indices, step.seq_lens)

    def _snapshot(self, gpu: GpuAttention, step: Step, in_capture: bool) -> GpuStep:
        self._report_violation(gpu)
        statistics = self._gpu_statistics if step.is_decode and not in_capture else None
        sampled = statistics is not None and statistics.before_snapshot()
        planned = gpu.snapshot(step, self.req_to_token_pool.req_to_token, self._slot_map)
        if statistics and sampled:
            statistics.after_snapshot(step.num_rows)
        self._record(step, sampled)
        return planned

    def _report_violation(self, gpu: GpuAttention) -> None:
        """What the GPU found wrong in the tables of an earlier step."""
        if status := gpu.violation():
            self._report(status)

    def _report(self, status: tuple[int, int, int, int]) -> None:
        """The request reads the padding page where its table is wrong, and the server goes on."""
        ids, width = f"0 <= slot < {self.num_pages * self.page_size}", self.req_to_token_pool.req_to_token.shape[1]
        self._violations.report(describe_status(status, "req_to_token", "seq_lens", ids, width))


def _output(forward_batch: Any, q: torch.Tensor, layer: Any) -> torch.Tensor:
    """[T, H, Dv] where the result goes: between the segments of a prefill graph SGLang says where, else anywhere."""
    shape = q.shape[0], layer.tp_q_head_num, layer.v_head_dim
    given = getattr(forward_batch, "_attn_output", None)
    if given is not None and given.dtype == q.dtype and given.numel() == math.prod(shape) and given.is_contiguous():
        return given.view(shape)
    return q.new_empty(shape)


def _divided(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """K or V of T tokens as it is stored: divided by its scale, a number, [1] or [G]."""
    if scale is None:
        return x
    if isinstance(scale, torch.Tensor) and scale.numel() > 1:
        x, scale = x.view(x.shape[0], scale.numel(), -1), scale.view(-1, 1)
    return x / scale
