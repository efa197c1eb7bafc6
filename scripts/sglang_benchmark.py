"""SGLang's own benchmark client (``sglang.benchmark.serving``) on a row of bench_serve.py.

It sends text and times tokens by their text, so the server and the client need a tokenizer. Dummy weights have none:
``toy_tokenizer`` makes one, a word for each id.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 900
FIGURES = (
    *("duration", "completed", "total_output_tokens", "output_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms"),
)


def toy_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes a tokenizer of ``vocabulary`` words ("w0", "w1" ...) that gives back the ids of its own text."""
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def arguments(url: str, model: str, *, groups: int, requests: int, shared: int, own: int, output: int) -> list[str]:
    """``generated-shared-prefix`` where requests share, else ``random-ids``; all requests at once."""
    common = ["--backend", "sglang", "--base-url", url, "--model", model, "--tokenizer", model, "--disable-tqdm"]
    if requests > 1 and shared:
        data = ["generated-shared-prefix", "--gsp-num-groups", groups, "--gsp-prompts-per-group", requests]
        data += ["--gsp-system-prompt-len", shared, "--gsp-question-len", own, "--gsp-output-len", output]
        data += ["--gsp-ordered"]
    else:
        data = ["random-ids", "--num-prompts", groups * requests, "--random-range-ratio", 1]
        data += ["--random-input-len", shared + own, "--random-output-len", output]
    return [*common, "--dataset-name", *map(str, data)]


def run(url: str, model: str, **row: int) -> dict[str, Any]:
    """Its figures, with its dataset's name. The prompts are sent twice: the second time they are in the radix cache.

    Raises RuntimeError with the end of its output if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "sglang.benchmark.serving", *arguments(url, model, **row)]
        # HOME: it keeps generated prompts there, by the tokenizer's class, and would take those of another vocabulary.
        env = {**os.environ, "HOME": folder, "HF_HUB_OFFLINE": "1"}
        for _ in range(2):
            done = subprocess.run(
                [*command, "--output-file", str(out)], env=env, capture_output=True, text=True, timeout=SECONDS
            )
            if done.returncode:
                raise RuntimeError(f"sglang.benchmark.serving failed:\n{(done.stdout + done.stderr)[-3000:]}")
        result = json.loads(out.read_text().splitlines()[-1])
    return {"dataset": result["dataset_name"], **{name: result[name] for name in FIGURES}}
