"""An engine with one feature of a deployment, on a small model of random weights; prints its tokens.

    python tests/serve/feature_main.py lora flashcore_sparse

lora: an adapter for every other request. hicache: a pool too small for the prompts, which go to the host and come back.
pd: a decode server without its prefill server, on SGLang's stand-in for the transfer: prompts' K and V are 0.
A file of its own: the engine spawns processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ports import own_port
from spec_main import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, TOKENS, make_model
from ties import ASK, best_two

RANK = 8
ROWS_OF = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
"""Heads of the projections that the adapter changes."""
SHARED, OWN, REQUESTS = 300, 20, 4
POOL = {"hicache": 1024}
"""Slots; two groups of requests fit in hicache's at a time."""
FAKE_PREFILL_SERVER = "2.2.2.2"
"""What SGLang calls FAKE_BOOTSTRAP_HOST."""


def make_adapter(folder: str) -> str:
    """Random weights as PEFT writes them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(LAYERS):
        for name, heads in ROWS_OF.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = 0.1 * torch.randn(RANK, HIDDEN, generator=generator)
            weights[f"{at}.lora_B.weight"] = 0.1 * torch.randn(heads * HEAD_DIM, RANK, generator=generator)
    save_file(weights, Path(folder) / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    (Path(folder) / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(ROWS_OF)}))
    return folder


def engine_arguments(feature: str) -> dict[str, Any]:
    if feature == "lora":
        return {"lora_paths": {"adapter": make_adapter(tempfile.mkdtemp())}, "max_loras_per_batch": 2}
    if feature == "hicache":
        return {
            "enable_hierarchical_cache": True,
            "hicache_ratio": 4.0,
            "hicache_write_policy": "write_through",
            "hicache_mem_layout": "layer_first",
            "hicache_io_backend": "direct",
        }
    return {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "fake"}


def compares(feature: str) -> bool:
    """Whether the engine is asked for what ties are told by; of a PD decode server the first token has no logprob."""
    return feature != "pd"


def request_arguments(feature: str) -> dict[str, Any]:
    if feature == "lora":
        return {"lora_path": ["adapter", None] * (REQUESTS // 2)}
    if feature == "pd":
        rooms = list(range(REQUESTS))
        return {"bootstrap_host": [FAKE_PREFILL_SERVER] * REQUESTS, "bootstrap_room": rooms}
    return {}


def main() -> None:
    import sglang

    feature, backend = sys.argv[1:]
    engine = sglang.Engine(
        model_path=make_model(tempfile.mkdtemp()),
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_total_tokens=POOL.get(feature, 8192),
        max_running_requests=REQUESTS,
        random_seed=1,
        log_level="info",
        nccl_port=own_port(),
        cuda_graph_max_bs_decode=4,
        mem_fraction_static=0.3,
        **engine_arguments(feature),
    )
    generator = torch.Generator().manual_seed(3)
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    own = [[(1 + i) * 7 + j for j in range(OWN)] for i in range(REQUESTS)]
    groups = [torch.randint(3, 1000, (SHARED,), generator=generator).tolist() for _ in range(3)]
    rounds = [*groups, groups[0]] if feature == "hicache" else [groups[0]]
    answers = []
    for shared in rounds:
        prompts = [shared + x for x in own]
        found = 0
        if feature != "pd":  # the first prompt is then in the cache, and its slots are shared
            first = engine.generate(input_ids=prompts[0], sampling_params={**sampling, "max_new_tokens": 1})
            found = first["meta_info"]["cached_tokens"]
        asked = request_arguments(feature) | (ASK if compares(feature) else {})
        done = engine.generate(input_ids=prompts, sampling_params=sampling, **asked)
        cached = [a["meta_info"]["cached_tokens"] for a in done]
        best = [best_two(a) if compares(feature) else [] for a in done]
        answers.append({"tokens": [a["output_ids"] for a in done], "best": best, "found": found, "cached": cached})
    print("ANSWERS " + json.dumps(answers), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
