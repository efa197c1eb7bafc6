"""An engine on one GPU or on two, on a small model of random weights; prints its tokens.

    python tests/serve/tensor_parallel_main.py flashcore_sparse 2

A file of its own: the engine spawns processes.
"""

from __future__ import annotations

import json
import sys
import tempfile

from ports import own_port
from spec_main import answers_of, make_model
from ties import ASK, best_two


def main() -> None:
    import sglang

    backend, gpus = sys.argv[1], int(sys.argv[2])
    engine = sglang.Engine(
        model_path=make_model(tempfile.mkdtemp()),
        skip_tokenizer_init=True,
        attention_backend=backend,
        tp_size=gpus,
        max_total_tokens=8192,
        max_running_requests=8,
        cuda_graph_max_bs_decode=8,
        mem_fraction_static=0.3,
        random_seed=1,
        log_level="info",
        nccl_port=own_port(),
    )
    answers = answers_of(engine, 8, **ASK)
    print("ANSWERS " + json.dumps([[a["output_ids"], best_two(a)] for a in answers]), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
