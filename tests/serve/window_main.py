"""An engine on a small gpt-oss of random weights, whose windows have a pool of their own; prints tokens.

Each prompt alone, then all at once: prefixes are then shared, prompts chunked, slots below the windows given to others.
A file of its own: the engine spawns processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import COMMON, SHAPES

SHARED, OWN, TOKENS = 400, 20, 150


def make_model(folder: str) -> str:
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    options = {**COMMON, **SHAPES["gpt-oss"], "torch_dtype": "float32", "initializer_range": 0.1}
    options = {name: value for name, value in options.items() if name not in ("model_type", "architectures")}
    GptOssForCausalLM(GptOssConfig(**options)).save_pretrained(folder)
    return folder


def main() -> None:
    import sglang
    import torch

    engine = sglang.Engine(
        model_path=make_model(tempfile.mkdtemp()),
        skip_tokenizer_init=True,
        attention_backend="flashcore_sparse",
        device="cpu",
        dtype="float32",
        max_total_tokens=4096,
        max_running_requests=6,
        chunked_prefill_size=128,
        log_level="info",
    )
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 1000, (SHARED + 6 * OWN,), generator=generator).tolist()
    prompts = [tokens[:SHARED] + tokens[SHARED + OWN * i : SHARED + OWN * (i + 1)] for i in range(6)]
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    alone = [engine.generate(input_ids=[p], sampling_params=sampling)[0]["output_ids"] for p in prompts[:2]]
    together = [a["output_ids"] for a in engine.generate(input_ids=prompts, sampling_params=sampling)]
    print("ANSWERS " + json.dumps({"alone": alone, "together": together}), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
