"""The prefix forest of a recorded decode batch, drawn in text and as a picture.

    FLASHCORE_RECORD=batch.npz python -m sglang.launch_server ...   # keeps the largest batch that was sampled
    python -m flashcore_sglang explain batch.npz                    # text; --png FILE draws it too

The picture: requests from left to right, positions from top to bottom. A box is a segment, read once for all requests
under it; the more of them, the darker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flashcore_sglang.layout import CsrLayout
from flashcore_sglang.recording import Recording

PICTURE_WIDTH, PICTURE_HEIGHT, MARGIN = 1200, 700, 60


@dataclass
class Node:
    """A segment: rows [first, last) of the layout's order, positions [begin, end)."""

    first: int
    last: int
    begin: int
    end: int
    children: list[Node] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.last - self.first

    @property
    def tokens(self) -> int:
        return self.end - self.begin


def forest(layout: CsrLayout) -> list[Node]:
    """The roots, in order. A node's children are read by some of its rows, after it."""
    roots: list[Node] = []
    path: list[Node] = []
    for rows, positions in zip(layout.segment_rows.tolist(), layout.segment_positions.tolist(), strict=True):
        node = Node(*rows, *positions)
        while path and not (path[-1].last >= node.last and path[-1].end <= node.begin):
            path.pop()
        (path[-1].children if path else roots).append(node)
        path.append(node)
    return roots


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def text(recording: Recording) -> str:
    """A summary, and a line for each shared segment; requests that go on alone are counted together."""
    layout = recording.layout()
    wanted, read = layout.tokens_wanted, layout.tokens_stored
    requests = int((~recording.padding).sum())
    lines = [
        f"{requests} requests, page size {recording.page_size}, {layout.num_segments} segments",
        f"KV tokens wanted {wanted:,}, read {read:,}: {wanted / max(1, read):.2f}x shared",
        f"a decode step reads {_bytes(read * recording.token_bytes)} of KV in all layers and saves "
        f"{_bytes((wanted - read) * recording.token_bytes)}",
        "",
    ]
    for root in _shared_first(forest(layout)):
        _describe(root, "", recording, lines)
    alone = [n for n in forest(layout) if n.rows == 1]
    if alone:
        lines.append(_alone(alone, "share nothing"))
    return "\n".join(lines)


def _shared_first(nodes: list[Node]) -> list[Node]:
    return sorted((n for n in nodes if n.rows > 1), key=lambda n: -n.tokens * (n.rows - 1))


def _alone(nodes: list[Node], words: str) -> str:
    lengths = sorted(n.tokens for n in nodes)
    span = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    return f"{len(nodes)} request{'s' * (len(nodes) > 1)} {words}, {span} tokens each"


def _describe(node: Node, indent: str, recording: Recording, lines: list[str]) -> None:
    saved = _bytes(node.tokens * (node.rows - 1) * recording.token_bytes)
    lines.append(f"{indent}{node.rows} requests share {node.tokens:,} tokens ({node.begin:,} to {node.end:,}): {saved}")
    for child in _shared_first(node.children):
        _describe(child, indent + "    ", recording, lines)
    if own := [n for n in node.children if n.rows == 1]:
        lines.append(f"{indent}    " + _alone(own, "go on alone"))


def draw(recording: Recording, path: Path) -> None:
    """Writes the picture. Raises ImportError without Pillow, which SGLang needs too, and OSError."""
    from PIL import Image, ImageDraw

    layout = recording.layout()
    rows, depth = max(1, layout.num_rows), max(1, int(recording.seq_lens.max()))
    across, down = (PICTURE_WIDTH - 2 * MARGIN) / rows, (PICTURE_HEIGHT - 2 * MARGIN) / depth
    picture = Image.new("RGB", (PICTURE_WIDTH, PICTURE_HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    for first, last, begin, end in _boxes(layout):
        box = (MARGIN + first * across, MARGIN + begin * down, MARGIN + last * across, MARGIN + end * down)
        shade = 235 - int(170 * min(1.0, (last - first - 1) / max(1, rows - 1)) ** 0.4) if last - first > 1 else 245
        outline = "black" if box[2] - box[0] > 4 else None
        pen.rectangle(box, fill=(shade, shade, 255) if last - first > 1 else (245, 235, 215), outline=outline)
        label = f"{last - first} x {end - begin:,}"
        if box[2] - box[0] > 8 * len(label) and box[3] - box[1] > 14:
            pen.text((box[0] + 4, box[1] + 2), label, fill="black" if shade > 150 else "white")
    saved = (layout.tokens_wanted - layout.tokens_stored) * recording.token_bytes
    title = (
        f"{rows} requests, {layout.tokens_stored:,} KV tokens read of {layout.tokens_wanted:,}: {_bytes(saved)} saved"
    )
    pen.text((MARGIN, 20), title, fill="black")
    pen.text(
        (MARGIN, PICTURE_HEIGHT - 40), f"requests, left to right; positions 0 to {depth:,}, downwards", fill="black"
    )
    picture.save(path)


def _boxes(layout: CsrLayout) -> list[tuple[int, int, int, int]]:
    pairs = zip(layout.segment_rows.tolist(), layout.segment_positions.tolist(), strict=True)
    return [(rows[0], rows[1], positions[0], positions[1]) for rows, positions in pairs]
