"""What this machine can serve with, and what is missing.

Neither torch nor SGLang is imported, so the report also comes where they are missing or broken.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from flashcore_sglang import env
from flashcore_sglang.requirements import (
    SGLANG_MAX,
    SGLANG_MIN,
    LayerFacts,
    ServingFacts,
    refusals,
    version_refusal,
    version_tuple,
)

ENTRY_POINT_GROUP = "sglang.srt.plugins"
ENTRY_POINT = "flashcore"
TVM_FFI_OLDEST, TVM_FFI_BELOW = "0.1.11", "0.2"
PYTHON_OLDEST = "3.10"
PACKAGES = ("torch", "sglang", "apache-tvm-ffi", "triton", "numpy")
INSTALL = "bash scripts/serve.sh makes an environment that works"


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str  # "9.0"
    driver: str

    @property
    def is_hopper(self) -> bool:
        return self.capability.startswith("9.")


@dataclass(frozen=True)
class Library:
    kind: str  # "cpu" or "cuda"
    path: str | None  # None: not built
    obstacle: str | None = None  # why it cannot be built here


@dataclass(frozen=True)
class Machine:
    """Everything the report is made from; tests make their own."""

    python: str
    versions: Mapping[str, str | None]  # package -> version, None: not installed
    torch_cuda: str | None  # the CUDA version torch was built for
    gpu: Gpu | None
    entry_point: str | None  # what ``flashcore`` of SGLang's plug-in group points to
    tools: Mapping[str, str | None]  # tool -> version and path
    libraries: tuple[Library, ...]
    importable: frozenset[str]  # of torchvision, sgl_kernel
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """``"cuda"`` or ``"cpu"``: which of the two paths SGLang would take by itself."""
        return "cuda" if self.gpu and self.torch_cuda else "cpu"


def problems(machine: Machine) -> list[str]:
    """Every reason why this machine cannot serve, each with its remedy."""
    found = [*_version_problems(machine), *_plugin_problems(machine), *_device_problems(machine)]
    return [*found, *_variable_problems()]


def refused() -> list[str]:
    """What the backend refuses at start on any machine: its own messages, for one example each."""
    served = ServingFacts(sglang_version=SGLANG_MAX, layers=(LayerFacts(0, 8, 2),))
    gpu = {"device": "cuda", "capability": "9.0", "model_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    examples: tuple[dict[str, Any], ...] = (
        {"is_mla": True},
        {"is_encoder_decoder": True},
        {"layers": (LayerFacts(0, 8, 2, has_temperature=True),)},
        {**gpu, "layers": (LayerFacts(0, 8, 2, 96, 96),)},
        {"page_size": 48},
        {"kv_cache_dtype": "float8_e5m2"},
        {"speculative_algorithm": "DFLASH"},
        {"deterministic": True},
    )
    return [reason for example in examples for reason in refusals(replace(served, **example))]


def _version_problems(machine: Machine) -> list[str]:
    out = []
    if version_tuple(machine.python) < version_tuple(PYTHON_OLDEST):
        out.append(f"python: want {PYTHON_OLDEST} or newer, got {machine.python}")
    out += [f"{p}: want it installed, got none; {INSTALL}" for p in PACKAGES if machine.versions.get(p) is None]
    sglang, tvm_ffi = machine.versions.get("sglang"), machine.versions.get("apache-tvm-ffi")
    if sglang and (reason := version_refusal(sglang)):
        out.append(reason)
    if tvm_ffi and not version_tuple(TVM_FFI_OLDEST) <= version_tuple(tvm_ffi) < version_tuple(TVM_FFI_BELOW):
        wanted = f">={TVM_FFI_OLDEST},<{TVM_FFI_BELOW}"
        out.append(f"apache-tvm-ffi: want {wanted}, got {tvm_ffi}; pip install 'apache-tvm-ffi{wanted}'")
    return out


def _plugin_problems(machine: Machine) -> list[str]:
    out = []
    if machine.entry_point is None:
        out.append(
            f"entry point: want {ENTRY_POINT} in group {ENTRY_POINT_GROUP}, got none; "
            "install this package: pip install --no-deps -e ."
        )
    allowed = machine.environ.get("SGLANG_PLUGINS", "")
    if allowed and ENTRY_POINT not in [name.strip() for name in allowed.split(",")]:
        out.append(f"SGLANG_PLUGINS: want {ENTRY_POINT} in it, got {allowed}; SGLang loads only the plug-ins it names")
    return out


def _device_problems(machine: Machine) -> list[str]:
    out = []
    if machine.device == "cuda":
        assert machine.gpu
        if not machine.gpu.is_hopper:
            out.append(
                f"GPU: want compute capability 9.0 (Hopper), got {machine.gpu.capability} ({machine.gpu.name}); "
                "choose another --attention-backend on this GPU"
            )
    else:
        if machine.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
            got = machine.environ.get("SGLANG_USE_CPU_ENGINE") or "nothing"
            out.append(
                f"SGLANG_USE_CPU_ENGINE: want 1 to serve on the CPU, got {got}; "
                "serve with bash scripts/serve.sh, or source scripts/environment.sh && prepare_environment"
            )
        out += [
            f"{module}: want it importable (SGLang imports it at start), got none; add {_stubs()} to PYTHONPATH"
            for module in ("sgl_kernel", "torchvision")
            if module not in machine.importable
        ]
    out += [
        f"{library.kind} library: want it built or a compiler, got neither; {library.obstacle}"
        for library in machine.libraries
        if library.kind == machine.device and library.path is None and library.obstacle
    ]
    return out


def _variable_problems() -> list[str]:
    out = []
    readers: tuple[Callable[[], object], ...] = (env.sharing, env.log_interval, env.record)
    for read in readers:
        try:
            read()
        except ValueError as error:
            out.append(str(error))
    return out


def notes(machine: Machine) -> list[str]:
    """What works, but not as one may expect."""
    out = []
    sglang = machine.versions.get("sglang")
    if sglang and version_tuple(sglang) > version_tuple(SGLANG_MAX):
        out.append(f"sglang {sglang} is newer than the newest tested, {SGLANG_MAX}")
    if machine.device == "cpu":
        if machine.gpu and machine.gpu.is_hopper:
            out.append(
                f"the {machine.gpu.name} stays idle: torch {machine.versions.get('torch')} is built without CUDA"
            )
        if machine.environ.get("TRITON_INTERPRET") != "1":
            out.append("page size 1 only: SGLang's allocator needs TRITON_INTERPRET=1 for others on the CPU")
    out += [
        f"{library.kind} library: not built yet, the first start compiles it; python -m flashcore_sglang build"
        for library in machine.libraries
        if library.kind == machine.device and library.path is None and not library.obstacle
    ]
    return out


def render(machine: Machine) -> str:
    """The report."""
    supported = {
        "sglang": f"{SGLANG_MIN} to {SGLANG_MAX}",
        "apache-tvm-ffi": f">={TVM_FFI_OLDEST},<{TVM_FFI_BELOW}",
    }
    versions = {"python": (machine.python, f">={PYTHON_OLDEST}")}
    versions |= {p: (machine.versions.get(p) or "not installed", supported.get(p, "")) for p in PACKAGES}
    lines = ["versions"]
    for name, (version, wanted) in versions.items():
        lines.append(f"  {name:<16}{version:<18}{f'supported: {wanted}' if wanted else ''}".rstrip())
    lines += ["plug-in", f"  {'entry point':<16}{machine.entry_point or 'not registered'}"]
    lines += ["device", f"  {'serves on':<16}{_device_words(machine)}"]
    lines += ["tools", *(f"  {tool:<16}{found or 'not found'}" for tool, found in machine.tools.items())]
    lines += ["libraries"]
    for library in machine.libraries:
        lines.append(f"  {library.kind:<16}{library.path or f'not built{_because(library.obstacle)}'}")
    if remarks := notes(machine):
        lines += ["notes", *(f"  - {remark}" for remark in remarks)]
    lines += ["refused at start, for example", *(f"  - {reason}" for reason in refused())]
    if found := problems(machine):
        lines += ["problems", *(f"  - {problem}" for problem in found)]
        lines += ["", f"This machine cannot serve: {len(found)} problem{'s' * (len(found) > 1)}."]
    else:
        lines += ["", f"This machine can serve on the {'GPU' if machine.device == 'cuda' else 'CPU'}."]
    return "\n".join(lines)


def _because(obstacle: str | None) -> str:
    return f" ({obstacle})" if obstacle else ""


def _device_words(machine: Machine) -> str:
    gpu = machine.gpu
    if machine.device == "cuda":
        assert gpu
        return f"{gpu.name}, compute capability {gpu.capability}, driver {gpu.driver}"
    return "CPU" + (f" (a {gpu.name} is here, but torch has no CUDA)" if gpu else " (no NVIDIA GPU found)")


def _stubs() -> Path:
    return Path(__file__).resolve().parent / "_cpu_stubs"


def inspect() -> Machine:
    """Look at this machine. Imports neither torch nor SGLang; takes about 0.2 s."""
    return Machine(
        python=platform.python_version(),
        versions={package: installed(package) for package in PACKAGES},
        torch_cuda=torch_cuda_version(),
        gpu=first_gpu(),
        entry_point=next((e.value for e in metadata.entry_points(group=ENTRY_POINT_GROUP, name=ENTRY_POINT)), None),
        tools={"g++": _tool("cxx"), "nvcc": _tool("nvcc"), "CUTLASS": _cutlass()},
        libraries=tuple(_library(kind) for kind in ("cpu", "cuda")),
        importable=frozenset(m for m in ("torchvision", "sgl_kernel") if importlib.util.find_spec(m)),
        environ=os.environ,
    )


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda_version() -> str | None:
    """The CUDA version in torch/version.py, read as text: importing torch takes seconds and may fail."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*= *['\"]([^'\"]+)", text, re.M)
    return found[1] if found else None


def first_gpu() -> Gpu | None:
    """The first GPU, as nvidia-smi tells it."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        first = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
        name, capability, driver = (word.strip() for word in first.split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return Gpu(name, capability, driver)


def _tool(name: str) -> str | None:
    """Version and path of the compiler that build.py would take: ``"cxx"`` or ``"nvcc"``."""
    try:
        from flashcore_sglang import build

        path = build.cxx() if name == "cxx" else build.nvcc()
    except (ImportError, RuntimeError):
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)|(\d+\.\d+\.\d+)", text)
    return f"{(found[1] or found[2]) if found else 'unknown version'} ({path})"


def _cutlass() -> str | None:
    """CUTLASS headers in a package that SGLang installs; the GPU kernels may use them, the CPU needs none."""
    for package, include in (("flashinfer", "data/cutlass/include"), ("deep_gemm", "include")):
        spec = importlib.util.find_spec(package)  # locates without importing
        if spec and spec.origin:
            path = Path(spec.origin).parent / include
            if (path / "cute/tensor.hpp").is_file():
                return str(path)
    return None


def _library(kind: str) -> Library:
    """The library of these sources if it is built, or else whether there is a compiler to make it."""
    try:
        from flashcore_sglang import build

        path = build.library_path(kind)
        if path.exists():
            return Library(kind, str(path))
        _ = build.cxx() if kind == "cpu" else build.nvcc()
    except (ImportError, RuntimeError) as error:
        return Library(kind, None, str(error).splitlines()[0])
    return Library(kind, None)
