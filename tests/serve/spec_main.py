"""An engine that drafts in one way, on a small model of random weights that also drafts for itself; prints its tokens.

    python tests/serve/spec_main.py tree

A file of its own: the engine spawns processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from ports import own_port
from ties import ASK, best_two

COMMON = {"speculative_algorithm": "STANDALONE", "speculative_num_steps": 3}
VARIANTS = {
    "none": {},
    "none on pages": {"page_size": 16},
    "chain": {**COMMON, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4},
    "tree": {**COMMON, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8},
    "tree on pages": {**COMMON, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 6, "page_size": 16},
    "beside fa3": {
        **COMMON,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
        "attention_backend": "fa3",
        "decode_attention_backend": "flashcore_sparse",
    },
    "ngram": {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 8},
}
TOKENS = 24
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2, 512, 8, 2, 128


def make_model(folder: str) -> str:
    """Llama's shape in two layers, saved as a checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=1024,
        max_position_embeddings=16384,  # FA3 reads out of bounds where SGLang captures prompts longer than this
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def answers_of(engine: Any, requests: int, **asked: Any) -> list[dict[str, Any]]:
    """To prompts on a common prefix, which one request has put into the radix cache before."""
    import torch

    tokens = torch.randint(3, 1000, (300 + 20 * requests,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [tokens[:300] + tokens[300 + 20 * i : 320 + 20 * i] for i in range(requests)]
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    engine.generate(input_ids=prompts[:1], sampling_params=sampling)
    return engine.generate(input_ids=prompts, sampling_params=sampling, **asked)


def main() -> None:
    import sglang
    import torch

    cuda = torch.cuda.is_available()
    model = make_model(tempfile.mkdtemp())
    variant = {"attention_backend": "flashcore_sparse", **VARIANTS[sys.argv[1]]}
    if variant.get("speculative_algorithm") == "STANDALONE":
        variant["speculative_draft_model_path"] = model
    if cuda:
        variant |= {"cuda_graph_max_bs_decode": 4, "mem_fraction_static": 0.3}
    engine = sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        device="cuda" if cuda else "cpu",
        max_total_tokens=8192,
        max_running_requests=4,
        random_seed=1,
        log_level="info",
        nccl_port=own_port(),
        **variant,
    )
    drafts = "speculative_algorithm" in variant
    answers = answers_of(engine, 4, **({} if drafts else ASK))
    steps = [a["meta_info"].get("spec_verify_ct", TOKENS) for a in answers]
    best = [] if drafts else [best_two(a) for a in answers]
    print(
        "ANSWERS " + json.dumps({"tokens": [a["output_ids"] for a in answers], "steps": steps, "best": best}),
        flush=True,
    )
    engine.shutdown()


if __name__ == "__main__":
    main()
