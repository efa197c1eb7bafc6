"""Compile csrc/ into the two native libraries and load them.

``cpu``   csrc/pager/*.cc + csrc/api_cpu.cc, with g++. Runs everywhere.
``cuda``  csrc/**/*.cu + csrc/api_*.cc but the CPU's, with nvcc for sm_90a. Builds without a GPU.

Both depend on libtvm_ffi alone: no torch, no CPython, no libcudart (nvcc links the runtime
statically), so one build serves every torch and Python version.

    python -m flashcore_sglang build [cpu] [cuda]        # ahead of serving

A library is named by the hash of its sources, flags and tvm-ffi version; one that was built ahead is used without a
compiler. Objects are kept by the hash of their own unit, its headers and the compiler, so an edit recompiles what it
touches. Processes that start together (tensor-parallel ranks) wait for the first one; a library appears by rename,
never half written.

Environment
-----------
FLASHCORE_CACHE_DIR    where builds are kept      (~/.cache/flashcore)
CUDA_HOME, CUDA_PATH   CUDA toolkit               (the nvcc on PATH)
CXX                    C++ compiler               (g++)
MAX_JOBS               parallel compile units     (number of CPUs)
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm_ffi  # imports torch: the doctor must run without

KINDS = ("cpu", "cuda")
# "a": wgmma and setmaxnreg. Never -arch=sm_90: that pass drops them silently (csrc/common/ptx.cuh guards it).
ARCH = "-gencode=arch=compute_90a,code=sm_90a"
CXX_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-lineinfo",
    ARCH,
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas",
    "-v,--warn-on-spills,--warn-on-local-memory-usage",
)
_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.M)


def csrc_dir() -> Path:
    """csrc/ inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "csrc", here.parent / "csrc"):
        if path.is_dir():
            return path
    raise RuntimeError(f"csrc: want {here / 'csrc'} or {here.parent / 'csrc'}, got neither; reinstall flashcore-sglang")


def cache_dir() -> Path:
    return Path(os.environ.get("FLASHCORE_CACHE_DIR") or "~/.cache/flashcore").expanduser()


def cxx() -> str:
    """Path of the C++ compiler: $CXX, else g++ on PATH."""
    wanted = os.environ.get("CXX") or "g++"
    if found := shutil.which(wanted):
        return found
    raise RuntimeError(f"C++ compiler: want {wanted} on PATH, got none; install g++ (>= 11) or set CXX")


def nvcc() -> str:
    """Path of nvcc: $CUDA_HOME/bin/nvcc, else the one on PATH, else /usr/local/cuda/bin/nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    tried = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in tried:
        if found := shutil.which(candidate):
            return found
    raise RuntimeError(
        f"nvcc: want {' or '.join(tried)}, got none; install the CUDA toolkit (>= 12.8) or set CUDA_HOME"
    )


def _cpu_arch() -> list[str]:
    """x86-64-v3 where this CPU has it (AVX2, FMA, BMI2); else the compiler's baseline."""
    if platform.machine() != "x86_64":
        return []
    try:
        words = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return []
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2", "movbe", "f16c"} <= words else []


def _units(kind: str) -> list[Path]:
    src = csrc_dir()
    if kind == "cpu":
        return sorted([*(src / "pager").glob("*.cc"), src / "api_cpu.cc"])
    return sorted({*src.rglob("*.cu"), *src.glob("api_*.cc")} - {src / "api_cpu.cc"})


def _flags(kind: str) -> list[str]:
    if kind == "cpu":
        return [*CXX_FLAGS, *_cpu_arch()]
    # A build of its own for compute-sanitizer's racecheck (scripts/sanitize.sh): see csrc/common/ptx.cuh.
    return [*NVCC_FLAGS, *(["-DFLASHCORE_RACECHECK"] if os.environ.get("FLASHCORE_RACECHECK") == "1" else [])]


def _compile_command(kind: str) -> list[str]:
    from tvm_ffi.libinfo import find_include_path

    return [cxx() if kind == "cpu" else nvcc(), *_flags(kind), f"-I{csrc_dir()}", "-isystem", find_include_path()]


def _with_headers(unit: Path) -> list[Path]:
    """The unit and every header it includes with quotes, however deep, in a stable order."""
    found, todo = {}, [unit]
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found[path] = path.read_bytes()
        for name in _INCLUDE.findall(found[path]):
            todo += [(base / name.decode()).resolve() for base in (path.parent, csrc_dir())]
    return sorted(found)


def _hash(words: list[str], files: list[Path]) -> str:
    """Of flags and contents. Folders are left out: a checkout that moves keeps its builds."""
    h = hashlib.sha256("\0".join([metadata.version("apache-tvm-ffi"), *words]).encode())
    for f in files:
        h.update(f.name.encode() + b"\0" + f.read_bytes() + b"\0")
    return h.hexdigest()[:20]


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> str:
    p = subprocess.run(command, capture_output=True, text=True)
    if p.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{p.stdout}{p.stderr}")
    return p.stdout + p.stderr


def _compile(kind: str, unit: Path, objects: Path) -> Path:
    """Object of one unit, from the cache or made now; the compiler's report lies beside it."""
    command = _compile_command(kind)
    key = _hash([*_flags(kind), _compiler_version(command[0])], _with_headers(unit))
    out = objects / f"{unit.stem}-{key}.o"
    if not out.exists():
        tmp = out.with_suffix(f".{os.getpid()}.tmp.o")
        report = _run([*command, "-c", str(unit), "-o", str(tmp)])
        out.with_suffix(".log").write_text(report)
        tmp.rename(out)
    return out


def library_path(kind: str) -> Path:
    """Where the library of these sources lies, or will lie once it is built.

    Args:
        kind: ``"cpu"`` or ``"cuda"``; ValueError for another.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: want one of {KINDS}, got {kind!r}")
    name = _hash(_flags(kind), sorted({f for u in _units(kind) for f in _with_headers(u)}))
    return cache_dir() / f"{kind}-{name}" / f"flashcore_{kind}.so"


def _jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise RuntimeError(f"MAX_JOBS: want an integer >= 1, got {value!r}")
    return int(value)


def make_once(path: Path, make: Callable[[Path], None]) -> Path:
    """The file, made by the first process that asks while the others wait; return its path.

    Args:
        path: in a folder of its own. It appears by rename, never half written.
        make: writes the file to the path it is given, in that folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.tmp")
            make(unfinished)
            unfinished.rename(path)
    return path


def build(kind: str = "cuda") -> Path:
    """Compile one library unless it is in the cache; return its path.

    Args:
        kind: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: another kind. RuntimeError: no compiler (says what was looked for), or a unit
            does not compile (with the compiler's words).
    """
    lib = library_path(kind)
    if lib.exists():
        return lib
    compiler = _compile_command(kind)[0]
    objects = cache_dir() / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def make(out: Path) -> None:
        with ThreadPoolExecutor(_jobs()) as pool:
            made = list(pool.map(lambda unit: _compile(kind, unit, objects), _units(kind)))
        from tvm_ffi.libinfo import find_libtvm_ffi

        ffi = Path(find_libtvm_ffi())
        link = [compiler, "-shared", "-pthread"] if kind == "cpu" else [compiler, "-shared", ARCH]
        _run([*link, *map(str, made), f"-L{ffi.parent}", "-ltvm_ffi", "-o", str(out)])
        (out.parent / "compile.log").write_text("".join(o.with_suffix(".log").read_text() for o in made))

    return make_once(lib, make)


@functools.cache
def library(kind: str = "cuda") -> tvm_ffi.Module:
    """The loaded library; built on first use unless ``python -m flashcore_sglang build`` did it before."""
    import tvm_ffi

    return tvm_ffi.load_module(str(build(kind)))
