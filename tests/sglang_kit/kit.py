"""SGLang's attention test kit (``sglang.test.kits.attention_unittest``) around our backend.

The kit builds a mock ModelRunner with real pools, asks the registry for a backend, and compares its output with
attention written in PyTorch. On a GPU its cases run at the head dim and dtype that the kernels serve, elsewhere in
float32 on the CPU.

The kit has no request that shares another's pages: ``share_prefixes`` makes some.
"""

from __future__ import annotations

import unittest

import needs
import torch

needs.sglang()

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

from flashcore_sglang.plugin import NAME, register

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
OPTIONS = (
    {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "max_context_len": 1024}
    if HOPPER
    else {"device": "cpu", "dtype": torch.float32, "head_dim": 16, "max_context_len": 1024}
)


def prepare(monkeypatch) -> None:
    """Registers our backend, and gives the kit's runner the model that a real one has: its attention layer."""
    register()
    if not HOPPER:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # asked of the environment for page sizes above 1

    def model(runner) -> torch.nn.Module:
        if given := vars(runner).get("given_model"):
            return given
        config, window = runner.model_config, runner.sliding_window_size
        layer = RadixAttention(
            config.num_attention_heads,
            config.head_dim,
            config.head_dim**-0.5,
            config.num_key_value_heads,
            layer_id=0,
            sliding_window_size=-1 if window is None else window,
        )
        return torch.nn.ModuleList([layer])

    def set_model(runner, given) -> None:
        """The kit has models without layers, too; ours reads the layers at start."""
        if isinstance(given, torch.nn.Module) and any(isinstance(m, RadixAttention) for m in given.modules()):
            vars(runner)["given_model"] = given

    # A window has one more key than its size says, as in all of SGLang's backends but triton.
    monkeypatch.setattr(kit, "_SWA_DECODE_EXTEND_WINDOW", kit._SWA_DECODE_EXTEND_WINDOW | {NAME})
    monkeypatch.setattr(kit.MockModelRunner, "model", property(model, set_model), raising=False)


def case(
    name: str, prefix_lens, *, extend_lens=(), heads=8, kv_heads=2, page_size=1, window=None
) -> kit.DenseAttentionCase:
    mode = ForwardMode.EXTEND if extend_lens else ForwardMode.DECODE
    lens = tuple(prefix_lens), tuple(extend_lens)
    return kit.DenseAttentionCase(name, NAME, mode, heads, kv_heads, page_size, *lens, sliding_window_size=window)


def build(case: kit.DenseAttentionCase, **options) -> kit.DenseAttentionFixture:
    """The kit's fixture for a case: pools, backend, module, batch, hidden states."""
    with torch.no_grad():
        return kit.build_dense_attention_fixture(unittest.TestCase(), case, **{**OPTIONS, **options})


def share_prefixes(fixture: kit.DenseAttentionFixture, groups: list[tuple[list[int], int]]) -> None:
    """Makes requests of one group read the same pages for their first tokens, as SGLang's radix cache does.

    Args:
        groups: (requests, tokens they share); tokens are a multiple of the page size and at most each one's prefix.

    Slots that no request uses are filled with NaN: who reads them has read a freed page.
    """
    rows = fixture.forward_batch.req_pool_indices.tolist()
    table = fixture.runner.req_to_token_pool.req_to_token
    for (leader, *followers), tokens in groups:
        for request in followers:
            table[rows[request], :tokens] = table[rows[leader], :tokens]
            fixture.prefix_hidden[request][:tokens] = fixture.prefix_hidden[leader][:tokens]
    free = torch.ones(len(buffers(fixture)[0]), dtype=torch.bool, device=table.device)
    free[used_slots(fixture)] = False
    free[0] = False  # SGLang's padding slot
    for buffer in buffers(fixture):
        buffer[free] = torch.nan


def buffers(fixture: kit.DenseAttentionFixture) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the pool, [slots, heads, dim]."""
    pool = fixture.runner.token_to_kv_pool
    return pool.get_key_buffer(0), pool.get_value_buffer(0)


def used_slots(fixture: kit.DenseAttentionFixture) -> torch.Tensor:
    """The slots that the batch's requests read or write, each once."""
    table, batch = fixture.runner.req_to_token_pool.req_to_token, fixture.forward_batch
    pairs = zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)
    return torch.cat([table[row, :length] for row, length in pairs]).long().unique()


def check(fixture: kit.DenseAttentionFixture) -> None:
    """Runs the batch eagerly and compares it with the kit's reference."""
    actual = kit.run_dense_fixture_eager(fixture)
    expected = kit.expected_dense_fixture_output(fixture)
    torch.testing.assert_close(actual, expected, atol=kit.DENSE_ATOL, rtol=kit.DENSE_RTOL)
