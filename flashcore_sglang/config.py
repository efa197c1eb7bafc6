"""Constants read from configs/, which says where they come from."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

_COST_LIMIT = 2**30  # its product with 2**20 tokens and 2**10 rows fits 64 bits


@dataclass(frozen=True)
class CostModel:
    """What the pager weighs when it decides whether rows read a common prefix together or each by itself.

    A prefix of ``length`` tokens that ``rows`` rows have in common, and that would otherwise be read ``tops`` times, is
    shared if ``length * (tops - 1) * token_cost >= segment_cost + rows * partial_cost``. All are integers, so that the
    CPU and the GPU decide alike.

    Attributes:
        token_cost:   reading the KV of one token once; the unit.
        segment_cost: one more segment, whatever its size.
        partial_cost: one row's partial result: written, read and merged.
    """

    token_cost: int = 1
    segment_cost: int = 0
    partial_cost: int = 0

    def __post_init__(self) -> None:
        for name in ("token_cost", "segment_cost", "partial_cost"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value <= _COST_LIMIT:
                raise ValueError(f"{name}: want an integer, 0 <= cost <= {_COST_LIMIT}, got {value!r}")


SHARE_ALWAYS = CostModel()
"""Every common prefix is shared, however short."""


def config_dir() -> Path:
    """configs/ inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "configs", here.parent / "configs"):
        if path.is_dir():
            return path
    raise RuntimeError(
        f"configs: want {here / 'configs'} or {here.parent / 'configs'}, got neither; reinstall flashcore-sglang"
    )


def _constants(name: str, device: str) -> dict[str, int]:
    return json.loads((config_dir() / f"{name}.json").read_text())[device]


@functools.cache
def cost_model(device: str) -> CostModel:
    """The model of configs/cost_model.json for ``"cpu"`` or ``"hopper"``."""
    return CostModel(**_constants("cost_model", device))


@dataclass(frozen=True)
class GatherModel:
    """When K and V are copied to consecutive slots before the extend kernel reads them.

    Attributes:
        mebibytes:      for the copies; what does not fit is read where it is.
        max_page_size:  pages larger than this are long enough as they are.
        rows_scattered: query rows (tokens by heads of a KV head) that must read a segment of runs below 8 tokens.
        rows_boxed:     the same for runs of 8 to 64 tokens.
        rows_converted: of a float8_e4m3fn cache all that a step reads is copied as values of q's dtype, at any page
                        size, or nothing is: if so many query rows read a token of it, on average.
    """

    mebibytes: int
    max_page_size: int
    rows_scattered: int
    rows_boxed: int
    rows_converted: int


@functools.cache
def gather_model(device: str) -> GatherModel:
    """The model of configs/gather.json for ``"hopper"``."""
    return GatherModel(**_constants("gather", device))


@functools.cache
def schedule_costs(device: str, kv_dtype: object = None) -> tuple[int, ...]:
    """What tiles and items take, of configs/schedule.json: the last arguments of decode_schedule.

    Args:
        device:   ``"hopper"``.
        kv_dtype: of the KV cache; torch.float8_e4m3fn has numbers of its own.
    """
    costs = _constants("schedule", f"{device}_e4m3" if "e4m3" in str(kv_dtype) else device)
    return tuple(costs[x] for x in ("wide_ns", "wide_item_ns", "narrow_ns", "narrow_item_ns", "hbm_ps"))
