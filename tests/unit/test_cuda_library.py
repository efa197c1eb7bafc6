"""The CUDA library compiles without a GPU; its machine code is what the kernels were written for."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from flashcore_sglang import build

try:
    build.nvcc()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


def cuobjdump() -> str:
    """On PATH, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    carried = triton and triton.origin and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not carried or not carried.is_file():
        pytest.skip("cuobjdump: not on PATH and not in triton")
    return str(carried)


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build("cuda")


@pytest.fixture(scope="module")
def report(library: Path) -> str:
    """What ptxas said of every kernel."""
    return (library.parent / "compile.log").read_text()


def test_every_kernel_has_a_resource_report(report: str) -> None:
    assert len(re.findall(r"Used \d+ registers", report)) >= 8


def test_no_kernel_spills(report: str) -> None:
    spilled = re.findall(r"([1-9]\d*) bytes spill", report)
    assert spilled == [], report


def test_no_kernel_uses_a_stack_frame(report: str) -> None:
    framed = re.findall(r"([1-9]\d*) bytes stack frame", report)
    assert framed == [], report


def test_no_matrix_product_waits_for_the_one_before(report: str) -> None:
    assert "wgmma.mma_async instructions are serialized" not in report, report


@pytest.fixture(scope="module")
def attention_kernels(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Machine code of the decode and extend kernels, by their mangled names. Its units are read side by side."""
    folder = tmp_path_factory.mktemp("units")
    run = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True)
    run([cuobjdump(), "--extract-elf", "all", str(library)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sass = "".join(pool.map(lambda unit: run([cuobjdump(), "--dump-sass", unit.name]).stdout, folder.iterdir()))
    kernels = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.S))
    return {name: code for name, code in kernels.items() if re.search("decode_kernel|extend_kernel", name)}


def test_attention_kernels_issue_warpgroup_matrix_products(attention_kernels: dict[str, str]) -> None:
    assert len(attention_kernels) >= 18  # 2 dtypes x 3 head dims; extend plain, with masks, with all
    assert [name for name, code in attention_kernels.items() if "HGMMA" not in code] == []


def test_every_wait_for_a_matrix_product_stands_once(attention_kernels: dict[str, str]) -> None:
    """The four warps of a warpgroup must wait at the same instruction. Behind a branch that each warp takes for
    itself, the compiler may make two of one wait: no result is wrong on most runs, and synccheck sees it."""
    waits = {
        kernel: (build.csrc_dir() / "attention" / source).read_text().count("ptx::wgmma_wait<")
        for kernel, source in (("decode_kernel", "consumer.cuh"), ("extend_kernel", "extend_consumer.cuh"))
    }
    copies = {
        name: (wanted, code.count("WARPGROUP.DEPBAR"))
        for name, code in attention_kernels.items()
        for kernel, wanted in waits.items()
        if kernel in name
    }
    assert {name: counts for name, counts in copies.items() if counts[0] != counts[1]} == {}
