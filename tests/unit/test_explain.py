"""Recorded batches and their drawings."""

from __future__ import annotations

import pytest
import torch

from flashcore_sglang import cli, explain
from flashcore_sglang.recording import Recorder, Recording


@pytest.fixture
def recording(tmp_path) -> Recording:
    """Two groups of 3 on 512 tokens, of which two also share 256 more; one request alone; one padded row."""
    table = torch.zeros(9, 1024, dtype=torch.int32)
    fresh = iter(range(1, 100_000))

    def take(count: int) -> torch.Tensor:
        return torch.tensor([next(fresh) for _ in range(count)], dtype=torch.int32)

    lens = [0] * 9
    for group in range(2):
        common, deeper = take(512), take(256)
        for i in range(3):
            row = 1 + 3 * group + i
            tokens = torch.cat([common, deeper if i else take(10), take(5 + row)])
            table[row, : len(tokens)], lens[row] = tokens, len(tokens)
    table[7, :300], lens[7] = take(300), 300
    recorder = Recorder(
        tmp_path / "batch.npz", page_size=1, num_pages=100_000, token_bytes=1024, device="cpu"
    )  # fmt: skip
    recorder.offer(table, torch.tensor([*range(1, 8), 0]), torch.tensor([*lens[1:8], 1]))
    return Recording.load(tmp_path / "batch.npz")


def test_file_holds_the_batch(recording):
    assert recording.pages.shape == (8, 779)
    assert recording.padding.tolist() == [False] * 7 + [True]


def test_forest_nests_what_shares(recording):
    roots = explain.forest(recording.layout())
    shared = [root for root in roots if root.rows > 1]
    assert [(n.rows, n.tokens) for n in shared] == [(3, 512), (3, 512)]
    assert [[(c.rows, c.tokens) for c in n.children if c.rows > 1] for n in shared] == [[(2, 256)], [(2, 256)]]


def test_text_counts_tokens_and_bytes(recording):
    lines = explain.text(recording).splitlines()
    layout = recording.layout()
    assert lines[0] == f"7 requests, page size 1, {layout.num_segments} segments"
    assert f"wanted {layout.tokens_wanted:,}, read {layout.tokens_stored:,}" in lines[1]
    assert "saves 2.5 MiB" in lines[2]  # 2 groups x (2 x 512 + 256) tokens of 1 KiB
    assert "3 requests share 512 tokens (0 to 512): 1.0 MiB" in lines
    assert "    2 requests share 256 tokens (512 to 768): 256.0 KiB" in lines
    assert "        2 requests go on alone, 7 to 8 tokens each" in lines


def test_command_prints_and_draws(recording, tmp_path, capsys):
    pytest.importorskip("PIL")
    assert cli.main(["explain", str(tmp_path / "batch.npz"), "--png", str(tmp_path / "forest.png")]) == 0
    assert "7 requests" in capsys.readouterr().out
    assert (tmp_path / "forest.png").read_bytes().startswith(b"\x89PNG")


def test_file_that_is_no_recording_is_refused(tmp_path, capsys):
    (tmp_path / "other").write_text("other")
    assert cli.main(["explain", str(tmp_path / "other")]) == 1
    assert "want a file that FLASHCORE_RECORD wrote" in capsys.readouterr().err
