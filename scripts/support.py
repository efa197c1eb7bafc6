"""The README's table of what is served, from the tests that ran.

    FLASHCORE_TEST_RECORD=/tmp/cpu.json bash scripts/test.sh
    python scripts/support.py /tmp/cpu.json ...     # records of several runs and machines
    python scripts/support.py                       # the table again, from what is recorded

A row names tests. Where all of them ran on a device and passed, the row says so, with their number; where one failed or
did not run, it says that. What is refused is asked of ``requirements``. scripts/results/support.json keeps the counts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections import Counter
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "support.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- support: begin -->\n", "<!-- support: end -->\n"
sys.path.insert(0, str(ROOT))

from flashcore_sglang import doctor  # noqa: E402

ROWS: list[tuple[str, list[str], list[str]]] = [
    (
        "decode over shared prefixes, several groups and levels",
        ["sglang_kit/test_dense.py::test_decode_over_shared_pages_equals_separate_requests"],
        ["gpu/test_decode.py::test_forests_are_exact", "gpu/test_decode.py::test_random_forests_are_exact"],
    ),
    (
        "prefill, chunks on a cached prefix, mixed batches",
        ["contract/test_backend.py::test_every_mode_with_new_tokens_is_an_extend"],
        [
            "gpu/test_extend.py::test_new_tokens_on_a_cached_prefix_are_exact",
            "gpu/test_extend.py::test_a_cached_prefix_and_decodes_in_one_batch_are_exact",
        ],
    ),
    (
        "page sizes 1, 16, 32, 64, 128",
        ["unit/test_attention.py::test_attend_equals_reference_for_page_sizes"],
        [
            "gpu/test_decode.py::test_pages_of_any_size_and_order_are_read_right",
            "gpu/test_extend.py::test_pages_of_any_size_and_order_are_read_right",
        ],
    ),
    (
        "head dims (GPU: 64, 128, 256; CPU: any), bf16 and fp16",
        ["unit/test_attention.py::test_attend_equals_reference_for_head_dims"],
        [
            "gpu/test_decode.py::test_head_dims_and_dtypes_are_exact",
            "gpu/test_extend.py::test_head_dims_and_dtypes_are_exact",
        ],
    ),
    (
        "multi-head, grouped-query, multi-query",
        ["unit/test_attention.py::test_attend_equals_reference_for_gqa_ratios"],
        ["gpu/test_decode.py::test_head_ratios_are_exact", "gpu/test_extend.py::test_head_ratios_are_exact"],
    ),
    (
        "logit cap, attention sinks",
        [
            "unit/test_attention.py::test_attend_with_logit_cap_equals_reference",
            "unit/test_attention.py::test_attend_with_sinks_equals_reference",
        ],
        [
            "gpu/test_decode.py::test_logit_cap_and_sinks_are_exact",
            "gpu/test_extend.py::test_logit_cap_and_sinks_are_exact",
        ],
    ),
    (
        "KV cache in FP8 (e4m3), with scales of a tensor or of each KV head",
        [
            "unit/test_attention.py::test_attend_on_an_e4m3_cache_equals_reference_on_its_values",
            "contract/test_backend.py::test_an_e4m3_cache_is_written_and_read_with_the_layers_scales",
        ],
        [
            "gpu/test_decode_fp8.py::test_scales_of_any_kind_are_applied",
            "gpu/test_decode_fp8.py::test_random_forests_are_exact",
            "gpu/test_extend_fp8.py::test_scales_of_any_kind_are_applied",
            "gpu/test_extend_fp8.py::test_random_batches_are_exact",
        ],
    ),
    (
        "sliding windows, in one pool or in a pool of their own",
        [
            "contract/test_sliding_window.py::test_full_and_windowed_layers_of_a_step",
            "serve/test_window_engine.py::test_a_request_in_a_crowd_answers_as_alone",
        ],
        [
            "gpu/test_window.py::test_captured_decode_with_a_window",
            "gpu/test_window.py::test_extend_with_a_window",
            "sglang_kit/test_graph.py::test_kit_replays_decode_with_a_window",
        ],
    ),
    (
        "chunked local attention",
        ["unit/test_window.py::test_chunks_of_any_batch_equal_the_definition"],
        ["gpu/test_window.py::test_chunked_local_attention"],
    ),
    (
        "encoder-only layers",
        ["contract/test_backend.py::test_layer_of_an_encoder_sees_ahead"],
        ["gpu/test_extend.py::test_attention_that_is_not_causal_is_exact"],
    ),
    (
        "speculative decoding: verification of chains and trees of drafts",
        ["contract/test_verify.py::test_verification_equals_the_definition"],
        [
            "gpu/test_window.py::test_captured_verification",
            "sglang_kit/test_verify.py::test_kit_verifies",
            "sglang_kit/test_verify.py::test_kit_replays_a_verification",
        ],
    ),
    (
        "draft models: chains and trees of steps, and what they take in",
        [
            "contract/test_drafts.py::test_every_step_equals_the_definition",
            "contract/test_drafts.py::test_verified_tokens_are_taken_in_with_fixed_buffers",
        ],
        [
            "gpu/test_drafts.py::test_every_step_equals_the_definition",
            "gpu/test_drafts.py::test_one_graph_follows_tables_that_change",
            "sglang_kit/test_drafts.py::test_kit_replays_the_steps_of_a_draft_model",
            "sglang_kit/test_drafts.py::test_kit_replays_what_a_draft_model_takes_in",
        ],
    ),
    (
        "engines that draft (STANDALONE, NGRAM)",
        [],
        ["serve/test_speculative.py::test_drafts_change_the_steps_and_not_the_tokens"],
    ),
    (
        "two-batch overlap",
        [
            f"contract/test_two_batch_overlap.py::test_{x}"
            for x in (
                "decode",
                "extend_between_requests",
                "extend_of_one_request_in_two_chunks",
                "halves_that_are_padded",
            )
        ],
        ["sglang_kit/test_graph.py::test_replays_in_two_halves"],
    ),
    (
        "data-parallel attention: padded and idle batches",
        [
            "contract/test_backend.py::test_idle_batch_needs_no_plan",
            "contract/test_backend.py::test_tokens_that_pad_the_batch_give_zeros",
            "contract/test_backend.py::test_extend_of_an_idle_rank_reads_the_padding_slot",
        ],
        [],
    ),
    (
        "LoRA adapters",
        [],
        ["serve/test_features.py::test_adapter_changes_the_requests_that_ask_for_it"],
    ),
    (
        "hierarchical cache (HiCache): prefixes that come back from the host",
        ["contract/test_radix_cache.py::test_prefix_that_hicache_loads_back_is_waited_for"],
        ["serve/test_features.py::test_prefixes_come_back_from_the_host"],
    ),
    (
        "decode side of PD-disaggregation (on SGLang's stand-in for the transfer)",
        [
            "contract/test_radix_cache.py::test_decode_server_of_pd_disaggregation_serves_rows_beyond_its_batch",
        ],
        ["serve/test_features.py::test_decode_server_of_pd_disaggregation"],
    ),
    (
        "tensor parallelism, on two GPUs",
        [],
        [f"serve/test_tensor_parallel.py::test_{x}" for x in ("both_ranks_serve_with_ours", "two_gpus_answer_alike")],
    ),
    (
        "decode CUDA graphs",
        [],
        [
            "sglang_kit/test_graph.py::test_kit_replays_decode",
            "sglang_kit/test_graph.py::test_replays_follow_groups_that_change",
        ],
    ),
    (
        "prefill between captured segments",
        ["contract/test_backend.py::test_result_goes_where_a_prefill_graph_wants_it"],
        ["sglang_kit/test_graph.py::test_kit_runs_extend_between_captured_segments"],
    ),
    (
        "deterministic inference, radix cache on",
        [],
        [
            "gpu/test_gpu_decode.py::test_deterministic_result_does_not_depend_on_the_batch",
            "gpu/test_window.py::test_deterministic_extend_gives_the_same_bits_alone_together_and_in_chunks",
        ],
    ),
    (
        "models shaped like Llama, gpt-oss, Gemma 2 and 3, Exaone 4",
        ["serve/test_shapes.py::test_logits_of_prompts_and_of_decode_steps"],
        ["serve/test_shapes.py::test_logits_of_prompts_and_of_decode_steps"],
    ),
    (
        "models shaped like Llama 4",
        ["serve/test_shapes.py::test_logits_with_attention_in_chunks"],
        ["serve/test_shapes.py::test_logits_with_attention_in_chunks"],
    ),
]
"""(what, its tests on a CPU, its tests on a Hopper GPU)"""


def summed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each device, of runs that may have shared its tests among them."""
    devices: dict[str, dict[str, Any]] = {}
    for record in records:
        total = devices.setdefault(record["device"], {**record, "passed": Counter(), "failed": Counter()})
        for outcome in ("passed", "failed"):
            total[outcome].update(record[outcome])
    return list(devices.values())


def merged(results: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """``results`` with the counts of a record for the tests that some row names."""
    named = {f"tests/{test}" for _, *both in ROWS for tests in both for test in tests}
    device = dict(results.get(record["device"], {}))
    for test in sorted(named & (record["passed"].keys() | record["failed"].keys())):
        device[test] = {"passed": record["passed"].get(test, 0), "failed": record["failed"].get(test, 0)}
        device[test]["sglang"] = record["sglang"]
    return {**results, record["device"]: dict(sorted(device.items()))}


def cell(tests: list[str], counts: dict[str, Any]) -> str:
    """What the tests of a row say of a device."""
    if not tests:
        return "—"
    found = [counts.get(f"tests/{test}", {"passed": 0, "failed": 0}) for test in tests]
    if any(x["failed"] for x in found):
        return "**fails**"
    if not all(x["passed"] for x in found):
        return "not run"
    return f"yes ({sum(x['passed'] for x in found)} tests)"


def table(results: dict[str, Any]) -> str:
    """The rows in Markdown, and the refusals below them."""
    lines = ["| | Hopper GPU | CPU |", "|---|---|---|"]
    for what, cpu, hopper in ROWS:
        on_gpu, on_cpu = cell(hopper, results.get("hopper", {})), cell(cpu, results.get("cpu", {}))
        lines.append(f"| {what} | {on_gpu} | {on_cpu} |")
    lines += ["", "Refused at the start, each with its reason:", ""]
    lines += [f"* {reason}" for reason in doctor.refused()]
    return "\n".join(lines) + "\n"


def replaced(readme: str, results: dict[str, Any]) -> str:
    """The README with the table of these results. Raises ValueError where the marks are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: want one {BEGIN.strip()} and one {END.strip()}")
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=pathlib.Path)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for record in summed([json.loads(path.read_text()) for path in parser.parse_args().records]):
        results = merged(results, record)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(replaced(README.read_text(), results))


if __name__ == "__main__":
    main()
