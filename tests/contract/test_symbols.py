"""Every name of SGLang that this package uses exists in the installed version, with the signature it relies on."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields

import needs
import pytest

needs.sglang()

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.version import __version__

from flashcore_sglang.backend import FlashCoreSparseBackend
from flashcore_sglang.requirements import version_refusal

pytestmark = pytest.mark.contract

SYMBOLS = {
    "sglang.version": ["__version__"],
    "sglang.srt.layers.attention.attention_registry": ["ATTENTION_BACKENDS", "register_attention_backend"],
    "sglang.srt.layers.attention.base_attn_backend": ["AttentionBackend"],
    "sglang.srt.layers.radix_attention": ["RadixAttention", "AttentionType"],
    "sglang.srt.mem_cache.memory_pool": ["KVWriteLoc", "MHATokenToKVPool", "ReqToTokenPool"],
    "sglang.srt.plugins": ["load_plugins"],
    "sglang.srt.plugins.hook_registry": ["HookRegistry", "HookType"],
    "sglang.srt.server_args": ["ATTENTION_BACKEND_CHOICES", "add_attention_backend_choices"],
    "sglang.srt.utils.common": ["support_triton"],
}


@pytest.mark.parametrize("module", SYMBOLS)
def test_module_has_the_names_we_use(module):
    loaded = importlib.import_module(module)
    assert [name for name in SYMBOLS[module] if not hasattr(loaded, name)] == []


def test_installed_version_is_supported():
    assert version_refusal(__version__) is None


OVERRIDDEN = [
    name
    for name, member in vars(FlashCoreSparseBackend).items()
    if inspect.isfunction(member) and not name.startswith("_") and hasattr(AttentionBackend, name)
]


def test_backend_overrides_the_hooks_of_the_contract():
    assert set(OVERRIDDEN) == {
        "init_forward_metadata_out_graph",
        "init_forward_metadata_in_graph",
        "init_cuda_graph_state",
        "get_cuda_graph_seq_len_fill_value",
        "update_verify_buffers_to_fill_after_draft",
        "forward_decode",
        "forward_extend",
    }


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_takes_what_sglang_passes(name):
    theirs = inspect.signature(getattr(AttentionBackend, name)).parameters
    ours = inspect.signature(getattr(FlashCoreSparseBackend, name)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for key, parameter in theirs.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        assert key in ours or open_ended, f"{name} lacks {key}"
        if key in ours:
            assert ours[key].default == parameter.default or ours[key].default is not parameter.empty


def test_every_abstract_method_is_implemented():
    assert not getattr(FlashCoreSparseBackend, "__abstractmethods__", None)


def test_base_class_still_calls_out_graph_then_in_graph():
    calls = []

    class Probe(FlashCoreSparseBackend):
        def __init__(self):
            pass

        def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
            calls.append("out")

        def init_forward_metadata_in_graph(self, forward_batch):
            calls.append("in")

    Probe().init_forward_metadata(None)
    assert calls == ["out", "in"]


def test_write_location_has_the_field_we_set():
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    assert "loc" in {f.name for f in fields(KVWriteLoc)}


def test_pool_keeps_a_padding_page_before_the_slots():
    from contract.sglang_fixtures import make_runner

    runner = make_runner(slots=64, page_size=16)
    assert runner.token_to_kv_pool.get_key_buffer(0).shape[0] == 64 + 16
    assert runner.req_to_token_pool.req_to_token.shape[0] == 16 + 1  # and a padding row


def test_layer_has_the_fields_we_read():
    from contract.sglang_fixtures import make_runner

    layer = make_runner().model[0]
    names = "layer_id tp_q_head_num tp_k_head_num qk_head_dim v_head_dim scaling logit_cap sliding_window_size"
    assert [n for n in (names + " is_cross_attention attn_type").split() if not hasattr(layer, n)] == []
