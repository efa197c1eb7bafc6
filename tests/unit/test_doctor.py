"""The report of ``python -m flashcore_sglang``: what counts as a problem, what it says, what it returns."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import flashcore_sglang
from flashcore_sglang import cli, doctor
from flashcore_sglang.doctor import Gpu, Library, Machine

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"torch": "2.11.0", "sglang": "0.5.16", "apache-tvm-ffi": "0.1.11", "triton": "3.6.0", "numpy": "2.4.6"}
HOPPER = Machine(
    python="3.11.7",
    versions=VERSIONS,
    torch_cuda="13.0",
    gpu=Gpu("NVIDIA H100", "9.0", "580.1"),
    entry_point="flashcore_sglang.plugin:register",
    tools={"g++": "12.2.0 (/usr/bin/g++)"},
    libraries=(Library("cpu", "/cache/flashcore_cpu.so"), Library("cuda", "/cache/flashcore_cuda.so")),
    importable=frozenset({"torchvision", "sgl_kernel"}),
    environ={},
)
CPU = replace(
    HOPPER,
    versions=VERSIONS | {"torch": "2.13.0+cpu"},
    torch_cuda=None,
    gpu=None,
    environ={"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1"},
)


@pytest.mark.parametrize("machine", [HOPPER, CPU], ids=["hopper", "cpu"])
def test_complete_machine_has_no_problem(machine):
    assert doctor.problems(machine) == []
    assert doctor.notes(machine) == []
    assert "This machine can serve on the " in doctor.render(machine)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (replace(CPU, python="3.9.2"), "python: want 3.10 or newer, got 3.9.2"),
        (replace(CPU, versions={**CPU.versions, "torch": None}), "torch: want it installed, got none; "),
        (replace(CPU, versions={**CPU.versions, "sglang": "0.5.9"}), "sglang: want 0.5.16 to 0.5.23, got 0.5.9; "),
        (
            replace(CPU, versions={**CPU.versions, "apache-tvm-ffi": "0.2.0"}),
            "apache-tvm-ffi: want >=0.1.11,<0.2, got 0.2.0; ",
        ),
        (replace(CPU, entry_point=None), "entry point: want flashcore in group sglang.srt.plugins, got none; "),
        (
            replace(CPU, environ={**CPU.environ, "SGLANG_PLUGINS": "other"}),
            "SGLANG_PLUGINS: want flashcore in it, got ",
        ),
        (replace(CPU, environ={}), "SGLANG_USE_CPU_ENGINE: want 1 to serve on the CPU, got nothing; "),
        (replace(CPU, importable=frozenset({"torchvision"})), "sgl_kernel: want it importable "),
        (
            replace(CPU, libraries=(Library("cpu", None, "C++ compiler: want g++ on PATH, got none"),)),
            "cpu library: want it built or a compiler, got neither; C++ compiler: ",
        ),
        (
            replace(HOPPER, gpu=Gpu("NVIDIA A100", "8.0", "580.1")),
            "GPU: want compute capability 9.0 (Hopper), got 8.0 (NVIDIA A100); ",
        ),
        (
            replace(HOPPER, libraries=(Library("cuda", None, "nvcc: want nvcc, got none"),)),
            "cuda library: want it built or a compiler, got neither; nvcc: ",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_problem_names_rule_value_and_remedy(machine, message):
    (problem,) = doctor.problems(machine)
    assert problem.startswith(message)
    assert problem in doctor.render(machine)
    assert "This machine cannot serve: 1 problem." in doctor.render(machine)


def test_all_problems_are_listed_at_once():
    machine = replace(CPU, versions=dict.fromkeys(VERSIONS), entry_point=None, environ={}, importable=frozenset())
    assert len(doctor.problems(machine)) == 5 + 1 + 1 + 2


def test_malformed_variable_is_a_problem(monkeypatch):
    monkeypatch.setenv("FLASHCORE_SHARING", "yes")
    assert doctor.problems(CPU) == ["FLASHCORE_SHARING: want 0 or 1, got 'yes'"]


def test_library_of_the_other_device_is_no_problem():
    assert doctor.problems(replace(CPU, libraries=(Library("cuda", None, "nvcc: want nvcc, got none"),))) == []


@pytest.mark.parametrize(
    ("machine", "note"),
    [
        (replace(CPU, versions={**CPU.versions, "sglang": "0.6.0"}), "newer than the newest tested, 0.5.23"),
        (replace(CPU, environ={"SGLANG_USE_CPU_ENGINE": "1"}), "page size 1 only"),
        (replace(CPU, gpu=HOPPER.gpu), "the NVIDIA H100 stays idle"),
        (replace(CPU, libraries=(Library("cpu", None),)), "cpu library: not built yet"),
    ],
    ids=["newer sglang", "no triton", "idle gpu", "not built"],
)
def test_note_does_not_refuse(machine, note):
    (found,) = doctor.notes(machine)
    assert note in found
    assert doctor.problems(machine) == []


def test_refused_examples_are_all_refused():
    assert len(doctor.refused()) == 8


def test_report_comes_without_torch_and_sglang(tmp_path):
    """A bare interpreter: -S leaves out site-packages, so nothing of the environment can be imported."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flashcore_sglang.cli import main; sys.exit(main([]))"
    )
    environ = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-S", "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "sglang: want it installed, got none" in done.stdout


def test_exit_code_says_whether_it_can_serve(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "inspect", lambda: CPU)
    assert cli.main([]) == 0
    monkeypatch.setattr(doctor, "inspect", lambda: replace(CPU, entry_point=None))
    assert cli.main([]) == 1
    assert "cannot serve" in capsys.readouterr().out


def test_build_refuses_an_unknown_kind(capsys):
    with pytest.raises(SystemExit):
        cli.main(["build", "rocm"])
    assert "kind: want cpu or cuda, got rocm" in capsys.readouterr().err


def test_build_reports_a_missing_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    assert cli.main(["build", "cpu"]) == 1
    assert "error: C++ compiler: want no-such-compiler on PATH, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "gpu"),
    [
        (
            "NVIDIA H100 80GB HBM3, 9.0, 580.1\\nNVIDIA H100 80GB HBM3, 9.0, 580.1",
            Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.1"),
        ),
        ("", None),
        ("No devices were found", None),
    ],
    ids=["two", "none", "words"],
)
def test_gpu_is_the_first_that_nvidia_smi_names(answer, gpu, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor.first_gpu() == gpu


def test_version_is_that_of_the_package():
    assert doctor.installed("flashcore-sglang") == flashcore_sglang.__version__
