"""The shell scripts: syntax, usage, which argument wins, and what is installed once."""

import http.server
import os
import re
import socket
import subprocess
import threading
from pathlib import Path

import announce
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def bash(command, **environ):
    """Run in the checkout, where no GPU is seen."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLASHCORE_")}
    return subprocess.run(
        ["bash", "-c", f"nvidia-smi() {{ return 9; }}; export -f nvidia-smi; {command}"],
        cwd=ROOT,
        env=clean | environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def served(*arguments, device="cpu"):
    """The command line that serve.sh would start SGLang with, as {argument: last value}."""
    gpu = "nvidia-smi() { echo 9.0; }; export -f nvidia-smi; " if device == "cuda" else ""
    done = bash(f"{gpu}bash scripts/serve.sh {' '.join(arguments)}", FLASHCORE_DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    values, words = {}, done.stdout.splitlines()
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, _, value = word.partition("=")
            values[name] = value or (following if not following.startswith("--") else True)
    return values


@pytest.mark.parametrize("script", [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci/run"], ids=lambda path: path.name)
def test_script_parses(script):
    assert bash(f"bash -n {script}").returncode == 0


@pytest.mark.parametrize("script", ["serve.sh", "test.sh"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_usage_and_makes_nothing(script, flag, tmp_path):
    done = bash(f"bash scripts/{script} {flag}", FLASHCORE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bash scripts/")
    assert list(tmp_path.iterdir()) == []


def test_serve_defaults_on_cpu():
    assert served() == {
        "--attention-backend": "flashcore_sparse",
        "--device": "cpu",
        "--dtype": "float32",
        "--max-total-tokens": "16384",
        "--max-running-requests": "16",
        "--model-path": "smollm2-135m-instruct",
        "--served-model-name": "smollm2-135m-instruct",
    }


def test_serve_leaves_sizes_to_sglang_on_hopper():
    assert served(device="cuda") == {
        "--attention-backend": "flashcore_sparse",
        "--model-path": "smollm2-135m-instruct",
        "--served-model-name": "smollm2-135m-instruct",
    }


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--attention-backend", "torch_native"),
        ("--dtype", "bfloat16"),
        ("--max-total-tokens", "512"),
        ("--device", "xpu"),
    ],
)
@pytest.mark.parametrize("join", [" ", "="])
def test_serve_lets_the_user_win(flag, value, join):
    assert served(f"{flag}{join}{value}")[flag] == value


@pytest.mark.parametrize("flag", ["--model-path", "--model"])
@pytest.mark.parametrize("join", [" ", "="])
def test_serve_own_model_replaces_the_default_one(flag, join):
    values = served(f"{flag}{join}/models/mine")
    assert values[flag] == "/models/mine"
    assert "--served-model-name" not in values


def test_serve_config_file_decides_what_it_can_set():
    assert served("--config", "server.yaml") == {"--attention-backend": "flashcore_sparse", "--config": "server.yaml"}


def test_serve_passes_other_arguments_on():
    values = served("--page-size", "16", "--disable-radix-cache")
    assert values["--page-size"] == "16"
    assert values["--disable-radix-cache"]


@pytest.mark.parametrize(
    ("capability", "device"), [("echo 9.0", "cuda"), ("echo 8.0", "cpu"), ("echo 10.0", "cpu"), ("return 9", "cpu")]
)
def test_device_is_cuda_on_hopper_alone(capability, device):
    done = bash(
        f"set -euo pipefail; source scripts/environment.sh; nvidia-smi() {{ {capability}; }}; flashcore_device",
    )
    assert done.stdout.strip() == device, done.stderr


def test_serve_refuses_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = bash(f"bash scripts/serve.sh --port {port}", FLASHCORE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert (
        done.stderr == f"error: port: want a free one, got {port} where something listens; pass another with --port\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_environment_refuses_an_unknown_sglang(tmp_path):
    done = bash("bash scripts/serve.sh", FLASHCORE_SGLANG="0.4.0", FLASHCORE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert done.stderr == "error: FLASHCORE_SGLANG: want 0.5.16 or 0.5.23, got 0.4.0\n"
    assert list(tmp_path.iterdir()) == []


def test_environment_refuses_a_missing_python(tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut", "flock", "mkdir", "head", "tail"):
        real = subprocess.run(["bash", "-c", f"command -v {tool}"], capture_output=True, text=True, check=True)
        (path / tool).symlink_to(real.stdout.strip())
    done = bash("bash scripts/serve.sh", PATH=str(path), FLASHCORE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "error: python: want python3.11 with the venv module on PATH, got none; install python3.11" in done.stderr


def test_environment_of_another_device_is_refused_and_kept(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".flashcore-venv").write_text(f"cuda, in {venv}")
    done = bash("bash scripts/serve.sh --port 1", FLASHCORE_VENV=str(venv))
    assert done.returncode == 1
    wanted = f"want an environment for cpu, in {venv}, got one for cuda, in {venv}; remove it"
    assert done.stderr == f"error: {venv}: {wanted}\n"
    assert venv.is_dir()


def test_step_runs_once_per_key_and_again_after_a_failure(tmp_path):
    done = bash(
        f"""source scripts/environment.sh; d={tmp_path}/venv
        _step $d x key1 one bash -c 'echo ran >&2; exit 3'; echo $?
        for key in key1 key1 key2; do _step $d x $key "$key" bash -c 'echo ran >&2'; echo $?; done""",
    )
    assert done.stdout.split() == ["1", "0", "0", "0"]
    assert re.findall(r"s\] (.*)", done.stderr) == ["one", "key1", "key2"]
    assert "error: one: want exit code 0, got a failure" in done.stderr
    assert (tmp_path / "venv.log").read_text() == "ran\n" * 3


def test_tools_have_one_version():
    """The hooks of pre-commit and test.sh must not disagree."""
    hooks = re.findall(r"additional_dependencies: \[(.*)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert set(hooks) <= set((SCRIPTS / "requirements-dev.txt").read_text().split())


@pytest.mark.parametrize("file", sorted(SCRIPTS.glob("requirements-*.txt")), ids=lambda path: path.name)
def test_requirements_are_pinned(file):
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    names = [re.fullmatch(r"([\w.-]+)==[\w.+]+", line)[1] for line in lines if line]
    assert len(names) == len({name.lower() for name in names})


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:7"),
        ("0.0.0.0", "http://127.0.0.1:7"),
        ("::", "http://[::1]:7"),
        ("box", "http://box:7"),
    ],
)
def test_announced_address_can_be_reached(host, url):
    assert announce.base_url(host, 7) == url


def test_announcement_waits_until_the_server_is_healthy(capsys, monkeypatch):
    answers = [503, 200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_port)
        monkeypatch.setattr(
            "sys.argv",
            ["announce", "--host", "0.0.0.0", "--port", port, "--model", "m", "--server-pid", str(os.getpid())],
        )
        assert announce.main() == 0
        server.shutdown()
    assert answers == []
    assert f"curl -s http://127.0.0.1:{port}/v1/chat/completions" in capsys.readouterr().err


def test_announcement_ends_with_the_server(monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(
        "sys.argv", ["announce", "--host", "127.0.0.1", "--port", "9", "--model", "m", "--server-pid", str(gone.pid)]
    )
    assert announce.main() == 1
