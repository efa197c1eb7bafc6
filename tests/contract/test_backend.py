"""The backend's corners: modes, padding, hooks and switches, on SGLang's pools without a model."""

from __future__ import annotations

import logging

import needs
import pytest
import torch

needs.sglang()

from contract.sglang_fixtures import DIM, HEADS, KV_HEADS, SCALE, MiniScheduler, make_runner
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from unit import fake_kernels

from flashcore_sglang import reference
from flashcore_sglang.backend import FlashCoreSparseBackend, _divided
from flashcore_sglang.gpu_attention import GpuStep
from flashcore_sglang.recording import Recording

pytestmark = pytest.mark.contract


@pytest.fixture
def scheduler() -> MiniScheduler:
    runner = make_runner(slots=2048, context=512)
    return MiniScheduler(runner, torch.Generator().manual_seed(0))


def tensors(scheduler: MiniScheduler, tokens: int):
    return (
        scheduler.random(tokens, HEADS * DIM),
        scheduler.random(tokens, KV_HEADS, DIM),
        scheduler.random(tokens, KV_HEADS, DIM),
    )


def wanted(scheduler: MiniScheduler, batch, q: torch.Tensor, **options) -> torch.Tensor:
    pool = scheduler.pool
    return reference.extend(
        q.view(-1, HEADS, DIM),
        pool.get_key_buffer(0),
        pool.get_value_buffer(0),
        scheduler.table,
        batch.req_pool_indices,
        batch.seq_lens,
        batch.extend_seq_lens,
        page_size=1,
        scale=SCALE,
        **options,
    ).view(len(q), -1)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("q_lens", [None, [30, 10]], ids=["decode", "extend"])
def test_steps_go_to_the_kernels_of_a_gpu(scheduler, monkeypatch, q_lens):
    """With which tables; tests/gpu says what they compute."""
    fake_kernels.install(monkeypatch)
    backend = FlashCoreSparseBackend(scheduler.runner)
    backend._gpu = backend._make_gpu(scheduler.runner)
    rows = [scheduler.add(list(range(30)))[0], scheduler.add(list(range(50, 60)))[0]]
    batch = scheduler.batch(rows, q_lens)
    backend.init_forward_metadata(batch)
    assert isinstance(backend.forward_metadata, GpuStep)
    q, k, v = tensors(scheduler, len(batch.out_cache_loc))
    scheduler.pool.get_key_buffer(0).nan_to_num_(0.0)
    scheduler.pool.get_value_buffer(0).nan_to_num_(0.0)
    out = backend.forward(q, k, v, scheduler.runner.model[0], batch)
    close(out, wanted(scheduler, batch, q))
    assert torch.equal(scheduler.pool.get_key_buffer(0)[batch.out_cache_loc], k)


@pytest.mark.parametrize("mode", ["EXTEND", "MIXED", "SPLIT_PREFILL"])
def test_every_mode_with_new_tokens_is_an_extend(scheduler, mode):
    backend = FlashCoreSparseBackend(scheduler.runner)
    rows = [scheduler.add(list(range(30)))[0], scheduler.add(list(range(50, 60)))[0]]
    batch = scheduler.batch(rows, [30, 10])
    batch.forward_mode = ForwardMode[mode]
    q, k, v = tensors(scheduler, 40)
    backend.init_forward_metadata(batch)
    close(backend.forward(q, k, v, scheduler.runner.model[0], batch), wanted(scheduler, batch, q))


def test_idle_batch_needs_no_plan(scheduler):
    backend = FlashCoreSparseBackend(scheduler.runner)
    batch = scheduler.batch([scheduler.add([1, 2])[0]], [2])
    batch.forward_mode = ForwardMode.IDLE
    backend.init_forward_metadata(batch)
    assert backend.forward_metadata is None
    q, k, v = tensors(scheduler, 0)
    assert backend.forward(q, k, v, scheduler.runner.model[0], batch).shape == (0, HEADS * DIM)


@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "tables of a GPU"])
def test_tokens_that_pad_the_batch_give_zeros(scheduler, kernels, monkeypatch):
    """As data-parallel attention pads: ``extend_num_tokens`` counts them, the lengths of the requests do not."""
    backend = FlashCoreSparseBackend(scheduler.runner)
    if kernels:
        fake_kernels.install(monkeypatch)
        backend._gpu = backend._make_gpu(scheduler.runner)
    batch = scheduler.batch([scheduler.add(list(range(20)))[0]], [20])
    q, k, v = tensors(scheduler, 24)
    batch.out_cache_loc = torch.cat([batch.out_cache_loc, torch.zeros(4, dtype=torch.int64)])  # SGLang's padding slot
    batch.extend_num_tokens, batch.extend_seq_lens_cpu = 24, [20]
    backend.init_forward_metadata(batch)
    got = backend.forward_extend(q, k, v, scheduler.runner.model[0], batch)
    close(got[:20], wanted(scheduler, batch, q[:20]))
    assert not got[20:].any()


def test_extend_of_an_idle_rank_reads_the_padding_slot(scheduler, caplog):
    """Where other ranks prefill, SGLang makes up one request of as many tokens, in row 0 of its table."""
    backend = FlashCoreSparseBackend(scheduler.runner)
    batch = scheduler.batch([scheduler.add([1, 2])[0]], [2])
    batch.req_pool_indices, batch.out_cache_loc = torch.zeros(1, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    batch.seq_lens = batch.extend_seq_lens = torch.tensor([7])
    batch.extend_num_tokens, batch.extend_seq_lens_cpu = 7, [7]
    backend.init_forward_metadata(batch)
    out = backend.forward(*tensors(scheduler, 7), scheduler.runner.model[0], batch)
    assert out.shape == (7, HEADS * DIM) and out.isfinite().all()
    assert "want" not in caplog.text, "no bound is violated"


@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "tables of a GPU"])
def test_layer_of_an_encoder_sees_ahead(scheduler, kernels, monkeypatch):
    layer = scheduler.runner.model[0]
    layer.attn_type = AttentionType.ENCODER_ONLY
    backend = FlashCoreSparseBackend(scheduler.runner)
    if kernels:
        fake_kernels.install(monkeypatch)
        backend._gpu = backend._make_gpu(scheduler.runner)
    batch = scheduler.batch([scheduler.add(list(range(20)))[0], scheduler.add([7] * 5)[0]], [20, 5])
    q, k, v = tensors(scheduler, 25)
    backend.init_forward_metadata(batch)
    got = backend.forward(q, k, v, layer, batch)
    close(got, wanted(scheduler, batch, q, causal=False))


def test_result_goes_where_a_prefill_graph_wants_it(scheduler):
    """Between captured segments SGLang narrows q to the real tokens and gives the slice of its static output."""
    backend = FlashCoreSparseBackend(scheduler.runner)
    batch = scheduler.batch([scheduler.add(list(range(20)))[0]], [20])
    q, k, v = tensors(scheduler, 20)
    backend.init_forward_metadata(batch)
    static = torch.full((32, HEADS * DIM), torch.nan)
    batch._attn_output = static[:20]
    got = backend.forward(q, k, v, scheduler.runner.model[0], batch, return_lse=False)
    assert got.data_ptr() == static.data_ptr()
    close(static[:20], wanted(scheduler, batch, q))
    batch._attn_output = static[:7]  # of another call
    assert backend.forward(q, k, v, scheduler.runner.model[0], batch).data_ptr() != static.data_ptr()


def test_kv_that_the_model_wrote_is_not_written_again(scheduler):
    backend = FlashCoreSparseBackend(scheduler.runner)
    batch = scheduler.batch([scheduler.add(list(range(20)))[0]], [20])
    q, k, v = tensors(scheduler, 20)
    layer = scheduler.runner.model[0]
    backend.init_forward_metadata(batch)
    first = backend.forward_extend(q, k, v, layer, batch)
    torch.testing.assert_close(backend.forward_extend(q, 2 * k, 2 * v, layer, batch, save_kv_cache=False), first)
    torch.testing.assert_close(backend.forward_extend(q, None, None, layer, batch), first)


def e4m3_scheduler() -> MiniScheduler:
    dtype = torch.float8_e4m3fn
    runner = make_runner(slots=2048, context=512, pool_dtype=dtype, kv_cache_dtype=dtype)
    return MiniScheduler(runner, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "k_scale, v_scale",
    [
        (None, None),
        (0.5, 2.0),
        (torch.nn.Parameter(torch.tensor(0.5), requires_grad=False), torch.tensor(2.0)),
        (torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0])),
    ],
)
def test_an_e4m3_cache_is_written_and_read_with_the_layers_scales(k_scale, v_scale):
    scheduler = e4m3_scheduler()
    backend, layer = FlashCoreSparseBackend(scheduler.runner), scheduler.runner.model[0]
    layer.k_scale, layer.v_scale = k_scale, v_scale
    row = scheduler.add(list(range(40)))[0]
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    for tokens in (40, 1):
        if tokens == 1:
            scheduler.append(row, 7)
        batch = scheduler.batch([row], [tokens] if tokens > 1 else None)
        q, k, v = tensors(scheduler, tokens)
        before = k.clone(), v.clone()
        backend.init_forward_metadata(batch)
        got = (backend.forward_extend if tokens > 1 else backend.forward_decode)(q, k, v, layer, batch)
        assert torch.equal(k, before[0]) and torch.equal(v, before[1])  # the pool itself would divide them in place
        close(got, wanted(scheduler, batch, q, **scales))
        stored = reference.scaled(scheduler.pool.get_key_buffer(0)[batch.out_cache_loc], k_scale)
        torch.testing.assert_close(stored, k.double(), rtol=2**-4, atol=2**-9)


def test_a_scale_of_each_kv_head_is_not_rounded_to_the_models_dtype():
    x, scale = torch.linspace(0.5, 1.0, 64, dtype=torch.bfloat16).view(4, 2, 8), torch.tensor([0.0123, 0.77])
    assert torch.equal(_divided(x, scale), x.float() / scale[:, None])


def test_scales_of_a_cache_in_the_models_dtype_are_not_applied(scheduler):
    backend, layer = FlashCoreSparseBackend(scheduler.runner), scheduler.runner.model[0]
    layer.k_scale, layer.v_scale = torch.tensor(0.5), torch.tensor(2.0)
    batch = scheduler.batch([scheduler.add(list(range(20)))[0]], [20])
    q, k, v = tensors(scheduler, 20)
    backend.init_forward_metadata(batch)
    close(backend.forward_extend(q, k, v, layer, batch), wanted(scheduler, batch, q))


def test_argument_that_is_not_served_is_refused(scheduler):
    backend = FlashCoreSparseBackend(scheduler.runner)
    batch = scheduler.batch([scheduler.add([1, 2])[0]], [2])
    backend.init_forward_metadata(batch)
    with pytest.raises(ValueError, match="want no argument but sinks from the model, got q_rope"):
        backend.forward_extend(*tensors(scheduler, 2), scheduler.runner.model[0], batch, q_rope=torch.ones(1))


def test_capture_is_refused_on_a_cpu(scheduler):
    backend = FlashCoreSparseBackend(scheduler.runner)
    row, _ = scheduler.add([1, 2])
    with pytest.raises(ValueError, match="CUDA graphs: want none on a CPU, got 1"):
        backend.init_forward_metadata_out_graph(scheduler.batch([row]), in_capture=True)
    with pytest.raises(ValueError, match="want CUDA graphs of decode and drafts only, got EXTEND"):
        backend.init_forward_metadata_out_graph(scheduler.batch([row], [2]), in_capture=True)


def test_sharing_is_switched_off_by_the_environment(scheduler, monkeypatch, caplog):
    monkeypatch.setenv("FLASHCORE_SHARING", "0")
    backend = FlashCoreSparseBackend(scheduler.runner)
    assert "nothing is shared (FLASHCORE_SHARING=0; unset it)" in caplog.text
    rows = [scheduler.add([*range(300), i])[0] for i in range(4)]
    for row in rows:
        scheduler.publish(row)
    batch = scheduler.batch(rows)
    assert _segments(backend, batch) == 4


def _segments(backend, batch) -> int:
    backend.init_forward_metadata(batch)
    return backend.forward_metadata.layout.num_segments


def test_unknown_value_of_the_switch_is_refused(scheduler, monkeypatch):
    monkeypatch.setenv("FLASHCORE_SHARING", "no")
    with pytest.raises(ValueError, match="FLASHCORE_SHARING: want 0 or 1, got 'no'"):
        FlashCoreSparseBackend(scheduler.runner)


def test_log_counts_what_was_read(scheduler, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FLASHCORE_LOG_INTERVAL", "2")
    backend = FlashCoreSparseBackend(scheduler.runner)
    rows = [scheduler.add([*range(300), i])[0] for i in range(4)]
    for row in rows:
        scheduler.publish(row)
    for _ in range(2):
        backend.init_forward_metadata(scheduler.batch(rows))
    assert "2 decode steps" in caplog.text
    assert "the last: 4 requests in 5 segments, KV tokens read 304 of 1204 (3.96x shared), pager" in caplog.text


def test_log_says_once_that_the_requests_share_nothing(scheduler, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FLASHCORE_LOG_INTERVAL", "1")
    backend = FlashCoreSparseBackend(scheduler.runner)
    rows = [scheduler.add([i] * 20)[0] for i in range(2)]
    for _ in range(8):
        backend.init_forward_metadata(scheduler.batch(rows))
    assert caplog.text.count("nothing is shared by these requests") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"disable_radix_cache": True}, "nothing is shared (--disable-radix-cache"),
        ({"disaggregation_mode": "decode"}, "nothing is shared (a PD decode server keeps no radix cache"),
        (
            {"disaggregation_mode": "decode", "disaggregation_decode_enable_radix_cache": True},
            "prefix sharing on",
        ),
    ],
)
def test_start_says_why_nothing_can_be_shared(scheduler, caplog, arguments, words):
    vars(scheduler.runner.server_args).update(arguments)
    FlashCoreSparseBackend(scheduler.runner)
    assert words in caplog.text


def test_recorded_batch_gives_the_segments_that_served_it(scheduler, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHCORE_LOG_INTERVAL", "1")
    monkeypatch.setenv("FLASHCORE_RECORD", str(tmp_path / "batch.npz"))
    backend = FlashCoreSparseBackend(scheduler.runner)
    rows = [scheduler.add([*range(300), i])[0] for i in range(4)]
    for row in rows:
        scheduler.publish(row)
    backend.init_forward_metadata(scheduler.batch(rows))
    backend.init_forward_metadata(scheduler.batch(rows[:2]))  # smaller: the file keeps the larger one
    recording = Recording.load(tmp_path / "batch.npz")
    assert recording.token_bytes == 2 * KV_HEADS * DIM * 4
    assert recording.layout().segment_positions.tolist() == [[0, 300], *[[300, 301]] * 4]


def test_violations_are_reported_again_after_a_while(scheduler, monkeypatch, caplog):
    from flashcore_sglang import statistics

    backend = FlashCoreSparseBackend(scheduler.runner)
    row, _ = scheduler.add([1, 2, 3])
    scheduler.table[row, 1] = -7
    for _ in range(3):
        backend.init_forward_metadata(scheduler.batch([row]))
    assert caplog.text.count("got -7 at row 0, position 1") == 1
    monkeypatch.setattr(statistics, "VIOLATION_SECONDS", 0.0)
    backend.init_forward_metadata(scheduler.batch([row]))
    assert "(4 such steps so far)" in caplog.text


@pytest.mark.parametrize("field", ["is_cross_attention", "logit_capping_method"])
def test_layer_that_is_not_served_is_refused(scheduler, field):
    layer = scheduler.runner.model[0]
    layer.logit_cap = 30.0
    value = {"logit_capping_method": "sigmoid"}.get(field, True)
    setattr(layer, field, value)
    with pytest.raises(ValueError, match="cannot serve this configuration:\n  - model: want"):
        FlashCoreSparseBackend(scheduler.runner)
