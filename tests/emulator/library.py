"""The attention kernels of csrc/ compiled for the emulated machine, by g++.

Environment
-----------
FLASHCORE_EMULATED_CSRC    csrc/ of another tree, whose kernels are to be tested by these tests
"""

from __future__ import annotations

import functools
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore_sglang import build

if TYPE_CHECKING:
    import tvm_ffi

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # kernels look at memory as it suits them
    "-D__CUDACC__",
)
OWN_FLAGS = {"products.cc": ["-O3"], "exports.cc": ["-O0"]}  # most of the time goes there: in tests, to the compiler


def csrc() -> Path:
    return Path(os.environ.get("FLASHCORE_EMULATED_CSRC") or build.csrc_dir()).resolve()


def missing() -> str | None:
    """Why there can be no emulator on this machine; None: there can."""
    if platform.machine() != "x86_64":
        return "the emulator is written for x86-64"
    try:
        build.cxx()
    except RuntimeError as error:
        return str(error)
    return None


def _units() -> list[Path]:
    return sorted([*HERE.rglob("*.cc"), *(csrc() / "attention").glob("*.cu")])


def _own_flags(unit: Path) -> list[str]:
    return ["-include", "window.h"] if unit.suffix == ".cu" else OWN_FLAGS.get(unit.name, [])


@functools.cache
def path() -> Path:
    """The library, compiled unless it is in the cache. Raises RuntimeError with the compiler's words."""
    from tvm_ffi.libinfo import find_include_path, find_libtvm_ffi

    sources = [
        p for folder in (HERE, csrc()) for p in sorted(folder.rglob("*")) if p.suffix in (".h", ".cuh", ".cu", ".cc")
    ]
    key = build._hash([*FLAGS, *build._cpu_arch(), str(OWN_FLAGS)], sources)
    include = ["-I", str(HERE), "-I", str(csrc()), "-isystem", find_include_path()]

    def make(out: Path) -> None:
        command = [build.cxx(), *FLAGS, *build._cpu_arch(), "-I", str(out.parent), *include]

        def compiled(unit: Path) -> Path:
            made = out.with_name(f"{unit.stem}.o")
            build._run([*command, *_own_flags(unit), "-x", "c++", "-c", str(unit), "-o", str(made)])
            return made

        headers = out.with_name("window.h.gch")  # takes g++ half a kernel's time
        build._run([*command, "-x", "c++-header", str(HERE / "window.h"), "-o", str(headers)])
        with ThreadPoolExecutor(build._jobs()) as pool:
            objects = list(pool.map(compiled, _units()))
        headers.unlink()
        ffi = Path(find_libtvm_ffi())
        build._run([build.cxx(), "-shared", *map(str, objects), f"-L{ffi.parent}", "-ltvm_ffi", "-o", str(out)])
        for o in objects:
            o.unlink()

    return build.make_once(build.cache_dir() / f"emulator-{key}" / "flashcore_emulator.so", make)


@functools.cache
def library() -> tvm_ffi.Module:
    import tvm_ffi

    return tvm_ffi.load_module(str(path()))
