"""The attention kernels of csrc/ compiled for the emulated machine, by g++.

Environment
-----------
FLASHCORE_EMULATED_CSRC    csrc/ of another tree, whose kernels are to be tested by these tests
"""

from __future__ import annotations

import fcntl
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
FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi")
# Shared memory holds many types, and the host's code of check_device asks for a CUDA compiler's arithmetic.
KERNEL_FLAGS = ("-O1", "-fno-strict-aliasing", "-D__CUDACC__")


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


def _flags(unit: Path) -> list[str]:
    own = ["-include", "window.h"] if unit.suffix == ".cu" else ["-O3"] if unit.name == "products.cc" else []
    return [*FLAGS, *build._cpu_arch(), *KERNEL_FLAGS, *own]


@functools.cache
def path() -> Path:
    """The library, compiled unless it is in the cache. Raises RuntimeError with the compiler's words."""
    from tvm_ffi.libinfo import find_include_path, find_libtvm_ffi

    sources = [
        p for folder in (HERE, csrc()) for p in sorted(folder.rglob("*")) if p.suffix in (".h", ".cuh", ".cu", ".cc")
    ]
    key = build._hash([*FLAGS, *build._cpu_arch(), *KERNEL_FLAGS], sources)
    out = build.cache_dir() / f"emulator-{key}"
    library = out / "flashcore_emulator.so"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        include = ["-I", str(HERE), "-I", str(csrc()), "-isystem", find_include_path()]

        def compiled(unit: Path) -> Path:
            made = out / f"{unit.stem}.o"
            build._run([build.cxx(), *_flags(unit), *include, "-x", "c++", "-c", str(unit), "-o", str(made)])
            return made

        with ThreadPoolExecutor(build._jobs()) as pool:
            objects = list(pool.map(compiled, _units()))
        ffi = Path(find_libtvm_ffi())
        made = library.with_suffix(".tmp")
        build._run([build.cxx(), "-shared", *map(str, objects), f"-L{ffi.parent}", "-ltvm_ffi", "-o", str(made)])
        for o in objects:
            o.unlink()
        made.rename(library)
    return library


@functools.cache
def library() -> tvm_ffi.Module:
    import tvm_ffi

    return tvm_ffi.load_module(str(path()))
