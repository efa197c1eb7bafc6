"""A small model of random weights through SGLang's ModelRunner: logits with our backend beside those of another.

    python tests/serve/shape_main.py gpt-oss --page-size 16 --beside definition fa3

Prints one line of JSON for each: the largest difference of logits of the prompts' last tokens and of each decode step,
relative to the largest logit, what planned our prompts, and whether decode ran in a CUDA graph. "definition" computes
every layer by ``reference.extend`` in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from shapes import SHAPES, write_model

PROMPTS, STEPS = (300, 150, 257, 40), 4


def make_runner(shape: str, page_size: int, options: dict[str, Any]) -> Any:
    """SGLang's runner of the model, with our backend and, on a GPU, its CUDA graphs."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    from flashcore_sglang.plugin import NAME

    one_batch.get_tokenizer = lambda *_, **__: None
    args = ServerArgs(
        model_path=write_model(Path(tempfile.mkdtemp()), shape),
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=NAME,
        page_size=page_size,
        max_total_tokens=8192,
        max_running_requests=8,
        random_seed=1,
        **options,
    )
    if hasattr(args, "resolve_once"):  # 0.5.23
        args.resolve_once()
        ranks = one_batch.SpawnRanks(world_rank=0, gpu_id=0)
        one_batch.publish(args, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return runner


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights large enough for attention to matter; SGLang's dummy weights are all about 1e-3."""
    torch.manual_seed(0)
    for name, x in model.named_parameters():
        if not x.is_floating_point():
            continue
        if "norm" in name:
            x.fill_(0.0 if "gemma" in type(model).__name__.lower() else 1.0)
        else:
            x.normal_(0.0, x.shape[-1] ** -0.5 if x.dim() > 1 else 0.5)


def run(runner: Any) -> tuple[torch.Tensor, str]:
    """[1 + STEPS, requests, vocabulary] logits, and the type of the prompts' plan.

    Every request goes on with the same tokens whatever the logits say.
    """
    from sglang.benchmark import one_batch

    inner = getattr(runner, "torch_runner", runner)
    inner.req_to_token_pool.clear()
    inner.token_to_kv_pool_allocator.clear()
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(3, 1000, (max(PROMPTS),), generator=generator).tolist()
    reqs = one_batch.prepare_synthetic_inputs_for_latency_test(len(PROMPTS), 0, [prompt[:n] for n in PROMPTS])
    _, logits, batch = one_batch.extend(reqs, inner)
    out, plan = [logits.float().cpu()], type(inner.attn_backend.forward_metadata).__name__
    for step in range(STEPS):
        tokens = torch.full((len(PROMPTS),), 5 + step, device=logits.device)
        _, logits = one_batch.decode(tokens, batch, inner)
        out.append(logits.float().cpu())
    return torch.stack(out), plan


def use(inner: Any, backend: Any) -> None:
    """The backend for all that follows, without graphs."""
    inner.attn_backend = backend
    inner.decode_cuda_graph_runner = inner.prefill_cuda_graph_runner = None
    for name in ("graph_runner", "eager_runner"):
        if hasattr(getattr(inner, name, None), "attn_backend"):
            getattr(inner, name).attn_backend = backend


def make_backend(name: str, inner: Any) -> Any:
    if name == "definition":
        from serve.definition import Definition

        return Definition(inner)
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS[name](inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--beside", nargs="+", default=["definition"])
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"device": device, "dtype": args.dtype}
    if device == "cuda":
        options.update(cuda_graph_max_bs_decode=4, mem_fraction_static=0.3)
    runner = make_runner(args.shape, args.page_size, options)
    inner = getattr(runner, "torch_runner", runner)
    randomise(inner.model)
    graph = getattr(inner, "decode_cuda_graph_runner", None) is not None
    ours, plan = run(runner)
    for name in args.beside:
        use(inner, make_backend(name, inner))
        want, _ = run(runner)
        top = want.abs().max()
        errors = ((ours - want).abs().amax(dim=(1, 2)) / top).tolist()
        line = {"shape": args.shape, "page_size": args.page_size, "beside": name, "plan": plan, "graph": graph}
        print(json.dumps({**line, "pool": type(inner.token_to_kv_pool).__name__, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
