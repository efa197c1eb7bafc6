"""The converter of the default model, on a GGUF file of a few kilobytes."""

import json

import gguf
import numpy as np
import prepare_model
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

HIDDEN, HEADS, KV_HEADS, INNER = 32, 4, 2, 48
TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "Ġ"]
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def permute(weight, num_heads):
    """What llama.cpp's converter does to a query or key projection."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, architecture="llama", extra=(), leave_out=""):
    """A one-layer model; returns its weights by GGUF's names, before llama.cpp's permutation."""
    rng = np.random.default_rng(0)
    weights = {f"blk.0.{name}.weight": rng.random(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    weights["token_embd.weight"] = rng.random((len(TOKENS), HIDDEN), dtype=np.float32)
    weights["output_norm.weight"] = rng.random(HIDDEN, dtype=np.float32)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    if leave_out != "rope.freq_base":
        writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, weight in [*weights.items(), *extra]:
        heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV_HEADS}.get(name)
        writer.add_tensor(name, permute(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def converted(tmp_path):
    weights = write_gguf(tmp_path / "m.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    prepare_model.convert(tmp_path / "m.gguf", folder, "float32")
    return weights, folder


def test_weights_are_those_before_llama_cpp_permuted_them(converted):
    weights, folder = converted
    state = load_file(folder / "model.safetensors")
    assert len(state) == len(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(state[prepare_model.hf_name(name)].numpy(), weight, err_msg=name)


def test_dtype_is_as_asked(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    prepare_model.convert(tmp_path / "m.gguf", tmp_path, "bfloat16")
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_describes_the_model(converted):
    config = json.loads((converted[1] / "config.json").read_text())
    expected = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_tokenizer_merges_and_splits_digits_and_keeps_control_tokens(converted):
    _, folder = converted
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>ab 12<|im_end|>").tokens == ["<|im_start|>", "ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("ab 12").ids) == "ab 12"
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_other_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match=r"m\.gguf: want general\.architecture llama, got qwen2"):
        prepare_model.convert(tmp_path / "m.gguf", tmp_path, "float32")


def test_unknown_tensor_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", extra=[("blk.0.attn_q.bias", np.zeros(HIDDEN, np.float32))])
    with pytest.raises(ValueError, match=r"want the tensors of a Llama model without biases, got blk\.0\.attn_q\.bias"):
        prepare_model.convert(tmp_path / "m.gguf", tmp_path, "float32")


def test_missing_field_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", leave_out="rope.freq_base")
    with pytest.raises(ValueError, match=r"gguf: want the field llama\.rope\.freq_base, got a file without it"):
        prepare_model.convert(tmp_path / "m.gguf", tmp_path, "float32")


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype: want one of float32, bfloat16, got float16"):
        prepare_model.convert(tmp_path / "m.gguf", tmp_path, "float16")


def test_prepared_model_is_fetched_once(tmp_path, monkeypatch):
    fetched = []

    def fetch(folder):
        fetched.append(folder)
        write_gguf(folder / "m.gguf")
        (folder / "LICENSE").write_text("Apache")
        return folder / "m.gguf"

    monkeypatch.setattr(prepare_model, "fetch", fetch)
    first = prepare_model.prepare("float32", tmp_path)
    assert first == prepare_model.prepare("float32", tmp_path) == tmp_path / "models/SmolLM2-135M-Instruct-float32"
    assert len(fetched) == 1
    assert {p.name for p in first.iterdir()} >= {"model.safetensors", "tokenizer.json", "config.json", "LICENSE"}
    assert [p.name for p in first.parent.iterdir() if p.is_dir()] == [first.name]  # no leftovers


def test_failed_conversion_leaves_no_model(tmp_path, monkeypatch):
    def fetch(folder):
        write_gguf(folder / "m.gguf", architecture="qwen2")
        return folder / "m.gguf"

    monkeypatch.setattr(prepare_model, "fetch", fetch)
    with pytest.raises(ValueError, match=r"general\.architecture"):
        prepare_model.prepare("float32", tmp_path)
    assert [p for p in (tmp_path / "models").iterdir() if p.is_dir()] == []
