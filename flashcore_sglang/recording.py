"""A decode batch in a file: which pages each request reads, for ``python -m flashcore_sglang explain``."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flashcore_sglang.config import cost_model
from flashcore_sglang.layout import CsrLayout, CsrPager


@dataclass(frozen=True)
class Recording:
    """A batch of B requests.

    Attributes:
        pages:     [B, blocks] int32, page of each block; what lies behind a request's end is arbitrary.
        seq_lens:  [B] int64, tokens.
        padding:   [B] bool: rows that pad the batch to the size of a CUDA graph.
        page_size: tokens per page.
        num_pages: of the KV pool.
        token_bytes: K and V of one token, all layers of one GPU.
        device:    "hopper" or "cpu", whose cost model decided.
    """

    pages: torch.Tensor
    seq_lens: torch.Tensor
    padding: torch.Tensor
    page_size: int
    num_pages: int
    token_bytes: int
    device: str

    def save(self, path: Path) -> None:
        """Writes the file, replacing an older one in one step. Raises OSError."""
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        arrays = {name: value.numpy() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        facts = np.array([self.page_size, self.num_pages, self.token_bytes])
        with open(draft, "wb") as file:
            np.savez_compressed(file, facts=facts, device=np.array(self.device), **arrays)
        os.replace(draft, path)

    @staticmethod
    def load(path: Path) -> Recording:
        """Raises ValueError for a file that is no recording, OSError if it cannot be read."""
        try:
            with np.load(path) as file:
                page_size, num_pages, token_bytes = (int(x) for x in file["facts"])
                arrays = {name: torch.from_numpy(file[name]) for name in ("pages", "seq_lens", "padding")}
                device = str(file["device"])
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"recording: want a file that FLASHCORE_RECORD wrote, got {path} ({error})") from None
        return Recording(
            **arrays, page_size=page_size, num_pages=num_pages, token_bytes=token_bytes, device=device
        )  # fmt: skip

    def layout(self) -> CsrLayout:
        """The segments that the pager makes of the batch, with sharing on."""
        pager = CsrPager(self.page_size, num_pages=self.num_pages, cost_model=cost_model(self.device))
        blocks, offsets = self.pages.long().repeat_interleave(self.page_size, 1), torch.arange(self.page_size)
        slots = blocks * self.page_size + offsets.repeat(self.pages.shape[1])
        table = torch.cat([torch.zeros_like(slots[:1]), slots]).to(torch.int32)  # row 0 is SGLang's padding row
        rows = torch.arange(1, len(table)).masked_fill(self.padding, 0)
        return pager.step(table, rows, self.seq_lens)


class Recorder:
    """Keeps the sampled batch with the most KV tokens in a file. Waits for the GPU: not for production."""

    def __init__(self, path: Path, *, page_size: int, num_pages: int, token_bytes: int, device: str) -> None:
        self._path, self._device, self._most = path, device, 0
        self._page_size, self._num_pages, self._token_bytes = page_size, num_pages, token_bytes

    def offer(self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """A decode batch; arguments as for ``DevicePager.snapshot``, on any device."""
        tokens = int(seq_lens.sum())
        if tokens <= self._most:
            return
        self._most = tokens
        slots = req_to_token[req_pool_indices, : int(seq_lens.max()) : self._page_size]
        Recording(
            pages=(slots // self._page_size).to("cpu", torch.int32),
            seq_lens=seq_lens.to("cpu", torch.int64),
            padding=(req_pool_indices == 0).cpu(),
            page_size=self._page_size,
            num_pages=self._num_pages,
            token_bytes=self._token_bytes,
            device=self._device,
        ).save(self._path)
