"""SGLang finds the backend through its real plug-in entry point, and what goes wrong there is loud."""

from __future__ import annotations

import os
import subprocess
import sys

import needs
import pytest

needs.sglang()

from contract.sglang_fixtures import make_runner

from flashcore_sglang.plugin import NAME, create_backend, register

pytestmark = pytest.mark.contract


def in_fresh_process(code: str, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    return run.stdout + run.stderr


CODE = """
import argparse
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, ServerArgs
print("registered", "flashcore_sparse" in ATTENTION_BACKENDS, "flashcore_sparse" in ATTENTION_BACKEND_CHOICES)
"""
PARSE = """
p = argparse.ArgumentParser()
ServerArgs.add_cli_args(p)
a = p.parse_args(["--model-path", "x", *"{flags}".split()])
print("{flags}:", a.attention_backend, a.prefill_attention_backend, a.decode_attention_backend)
"""
DECODE_ALONE = "--attention-backend torch_native --decode-attention-backend flashcore_sparse"
PARSED = {
    "--attention-backend flashcore_sparse": "flashcore_sparse None None",
    DECODE_ALONE: "torch_native None flashcore_sparse",
}


@pytest.fixture(scope="module")
def with_the_plugin() -> str:
    """What one process prints: to import SGLang takes seconds."""
    return in_fresh_process(CODE + "".join(PARSE.format(flags=x) for x in PARSED))


def test_entry_point_registers_name_in_registry_and_choices(with_the_plugin):
    assert "registered True True" in with_the_plugin


def test_name_is_unknown_without_the_plugin():
    assert "registered False False" in in_fresh_process(CODE, SGLANG_PLUGINS="none")


@pytest.mark.parametrize("flags", PARSED)
def test_command_line_accepts_the_name(with_the_plugin, flags):
    assert f"{flags}: {PARSED[flags]}\n" in with_the_plugin


def test_registering_twice_changes_nothing():
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    register()
    register()
    assert ATTENTION_BACKENDS[NAME] is create_backend
    assert ATTENTION_BACKEND_CHOICES.count(NAME) == 1


def test_factory_lists_every_reason_at_once():
    runner = make_runner(use_mla_backend=True)
    runner.page_size = 48
    runner.server_args.speculative_algorithm = "DFLASH"
    with pytest.raises(ValueError, match="flashcore_sparse cannot serve this configuration") as error:
        create_backend(runner)
    for reason in ("got MLA", "got 48", "got DFLASH"):
        assert reason in str(error.value)


def test_missing_compiler_stops_the_factory_with_the_remedy(tmp_path):
    code = (
        "from contract.sglang_fixtures import make_runner; from flashcore_sglang.plugin import create_backend; "
        "create_backend(make_runner())"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    env = {"FLASHCORE_CACHE_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    env["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    output = in_fresh_process(code, **env)
    assert "want no-such-compiler on PATH, got none; install g++" in output
