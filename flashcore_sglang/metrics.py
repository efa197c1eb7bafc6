"""What /metrics says of a running server started with ``--enable-metrics``, beside SGLang's own figures."""

from __future__ import annotations

import functools
from typing import Any

from flashcore_sglang.statistics import Sample


def metric_labels(model_runner: Any) -> dict[str, str] | None:
    """Labels as SGLang's scheduler writes them; None if this process reports nothing."""
    args = model_runner.server_args
    if not getattr(args, "enable_metrics", False):
        return None
    ranks = getattr(model_runner, "ps", None)
    if ranks is None:  # 0.5.23
        from sglang.srt.runtime_context import get_parallel

        ranks = get_parallel()
    if ranks.attn_tp_rank != 0 and not args.enable_metrics_for_all_schedulers:
        return None
    labels = {
        "model_name": args.served_model_name or args.model_path,
        "tp_rank": ranks.tp_rank,
        "pp_rank": ranks.pp_rank,
        **(getattr(args, "extra_metric_labels", None) or {}),
    }
    return {name: str(value) for name, value in labels.items()}


class SampleMetrics:
    """Publishes samples to Prometheus. The counters count every step like the sampled one of its interval.

    Args:
        labels: of ``metric_labels``.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._counters, self._gauges = _families(("path", *labels))

    def __call__(self, sample: Sample) -> None:
        labels = {"path": sample.path, **self._labels}
        counts = (sample.steps, sample.steps * sample.tokens_wanted, sample.steps * sample.tokens_read)
        for counter, count in zip(self._counters, counts, strict=True):
            counter.labels(**labels).inc(count)
        for gauge, value in zip(self._gauges, (sample.sharing_ratio, sample.segments, sample.pager_us), strict=True):
            gauge.labels(**labels).set(value)


@functools.cache  # Prometheus takes a name once in a process, where several backends may live
def _families(labels: tuple[str, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    # SGLang sets PROMETHEUS_MULTIPROC_DIR after its imports; the client must be imported after that.
    from prometheus_client import Counter, Gauge

    counters = (
        Counter("flashcore:decode_steps", "Decode steps, by what computed their attention.", labels),
        Counter("flashcore:kv_tokens_wanted", "KV tokens of all requests of the decode steps (estimated).", labels),
        Counter("flashcore:kv_tokens_read", "KV tokens that attention read in the decode steps (estimated).", labels),
    )
    gauges = (
        ("flashcore:sharing_ratio", "KV tokens wanted over KV tokens read in the last sampled decode step."),
        ("flashcore:segments", "Segments of the last sampled decode step."),
        ("flashcore:pager_microseconds", "Snapshot, pager and work list of the last sampled decode step."),
    )
    return counters, tuple(Gauge(name, words, labels, multiprocess_mode="mostrecent") for name, words in gauges)
