"""Wait until the server answers, then print a request to try (run by serve.sh beside the server)."""

import argparse
import json
import os
import sys
import time
import urllib.request


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_ready(url: str) -> bool:
    """``/health`` answers 200 once SGLang has served its own warm-up request, 503 before."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except OSError:  # refused, 503, time-out
        return False


def base_url(host: str, port: int) -> str:
    """An address to reach a server that listens on ``host`` from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def example(url: str, model: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 40,
    }
    return f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def say(started: float, words: str) -> None:
    print(f"[{time.time() - started:4.0f} s] {words}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--model", required=True)
    parser.add_argument("--server-pid", required=True, type=int)
    args = parser.parse_args()

    url, started = base_url(args.host, args.port), float(os.environ.get("FLASHCORE_STARTED") or time.time())
    said = time.time()
    while is_alive(args.server_pid):
        if is_ready(url):
            say(started, f"ready; Ctrl-C here stops the server. Try:\n\n  {example(url, args.model)}\n")
            return 0
        if time.time() - said >= 10:
            said = time.time()
            say(started, f"waiting for {url}/health")
        time.sleep(0.5)
    return 1  # the server ended before it was ready; it has said why


if __name__ == "__main__":
    sys.exit(main())
