"""Offline engine whose decode alone is ours; prints the answers. A file of its own: the engine spawns processes."""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the folder
    import sglang

    engine = sglang.Engine(
        model_path=sys.argv[1],
        device="cpu",
        dtype="float32",
        max_total_tokens=2048,
        max_running_requests=4,
        log_level="warning",
        prefill_attention_backend="torch_native",
        decode_attention_backend="flashcore_sparse",
    )
    prompts = json.loads(sys.argv[2])
    answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 24})
    print("ANSWERS " + json.dumps([a["text"] for a in answers]))
    engine.shutdown()
