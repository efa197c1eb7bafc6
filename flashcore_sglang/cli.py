"""The commands of ``python -m flashcore_sglang``.

python -m flashcore_sglang                           what this machine can serve with; exit code 1 if it cannot
python -m flashcore_sglang build [cpu] [cuda]        compile the libraries ahead of serving
python -m flashcore_sglang explain FILE [--png FILE] draw the prefix forest of a recorded batch
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from flashcore_sglang import doctor


def build_libraries(kinds: list[str]) -> int:
    """Compile, saying what and how long; 1 if one fails."""
    from flashcore_sglang import build

    if not kinds:
        gpu = doctor.first_gpu()
        kinds = ["cpu", "cuda"] if gpu and gpu.is_hopper and doctor.torch_cuda_version() else ["cpu"]
    started = float(os.environ.get("FLASHCORE_STARTED") or time.time())  # of the script that runs this

    def say(words: str) -> None:
        print(f"[{time.time() - started:4.0f} s] {words}", file=sys.stderr, flush=True)

    for kind in kinds:
        say(f"{kind} library: compiling, unless it is there")
        try:
            say(f"{kind} library: {build.build(kind)}")
        except (RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def explain(path: Path, png: Path | None) -> int:
    """Print the forest, and draw it if ``png`` is given; 1 if that fails."""
    from flashcore_sglang import explain as forest
    from flashcore_sglang.recording import Recording

    try:
        recording = Recording.load(path)
        print(forest.text(recording))
        if png:
            forest.draw(recording, png)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flashcore_sglang", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    builder = commands.add_parser("build", help="compile the libraries ahead of serving")
    builder.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="default: what this machine serves on")
    explainer = commands.add_parser("explain", help="draw the prefix forest of a batch that FLASHCORE_RECORD kept")
    explainer.add_argument("recording", type=Path)
    explainer.add_argument("--png", type=Path, metavar="FILE", help="draw it into this picture too")
    args = parser.parse_args(argv)
    if args.command == "build":
        unknown = set(args.kinds) - {"cpu", "cuda"}
        if unknown:
            builder.error(f"kind: want cpu or cuda, got {', '.join(sorted(unknown))}")
        return build_libraries(args.kinds)
    if args.command == "explain":
        return explain(args.recording, args.png)
    machine = doctor.inspect()
    print(f"flashcore-sglang {doctor.installed('flashcore-sglang') or '(not installed)'}\n\n{doctor.render(machine)}")
    return 1 if doctor.problems(machine) else 0
