"""Small models in the shape of those that SGLang treats specially: configurations, without weights or a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}

LLAMA4 = {  # attention in chunks, in three layers of four
    "model_type": "llama4_text",
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_chunk_size": 128,
    "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
    "no_rope_layers": [1, 1, 1, 0],
    "intermediate_size_mlp": 512,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 8,
    "use_qk_norm": True,
    "attn_temperature_tuning": False,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 10000.0,
    },
    "gpt-oss": {  # sinks, and a window in every other layer
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 150000.0,
        "rope_scaling": None,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
    "gemma2": {  # caps logits, and a window in every other layer
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "sliding_window": 128,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "exaone4": {
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "sliding_window": 128,
        "sliding_window_pattern": "LLLG",
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
    },
    "llama4": {  # as it is published, with the layers in chunks in a pool of their own
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {**COMMON, **LLAMA4},
        "vision_config": {},
    },
    "llama4-text": {"architectures": ["Llama4ForCausalLM"], **LLAMA4},
}


def write_model(folder: Path, shape: str, **changes: Any) -> str:
    """Writes the configuration of a shape of ``SHAPES``; returns the folder for ``--model-path``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **SHAPES[shape], **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return str(folder)
