"""The requests that every server gets, over the OpenAI API, and what came back."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import requests

MODEL = "smollm2-135m-instruct"
SYSTEM = "You are a careful assistant. " + " ".join(
    f"Rule {i}: always answer politely and keep the answer short, item {i}." for i in range(1, 55)
)  # 1,000 tokens
USERS = [f"Tell me a fact about the number {i}." for i in range(8)]
ROUNDS = 2


@dataclass
class Results:
    """Texts by name; `rates` are output tokens per second of each round of the shared case."""

    texts: dict[str, str] = field(default_factory=dict)
    cached_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    rates: list[float] = field(default_factory=list)


def chat(url: str, messages: list[dict], **options) -> dict:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 32, **options}
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    assert response.ok, response.text
    return response.json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def stream(url: str, messages: list[dict]) -> tuple[str, int]:
    """The text put together again, and the number of pieces it came in."""
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 32, "stream": True}
    pieces = []
    with requests.post(f"{url}/v1/chat/completions", json=body, timeout=300, stream=True) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                choices = json.loads(line[6:])["choices"]
                pieces += [choices[0]["delta"]["content"]] if choices and choices[0]["delta"].get("content") else []
    return "".join(pieces), len(pieces)


def shared_prompt(url: str, index: int, **options) -> dict:
    messages = [{"role": "system", "content": SYSTEM}, *user(USERS[index])]
    return chat(url, messages, max_tokens=40, ignore_eos=True, **options)


def run(url: str, rounds: int = ROUNDS) -> Results:
    """Plain, streaming, multi-turn, and 8 concurrent requests that share a system prompt."""
    out = Results()
    out.texts["plain"] = text_of(chat(url, user("What is the capital of France?")))
    out.texts["stream"], pieces = stream(url, user("Write one sentence about the sea."))
    assert pieces > 3, "streaming answers come in pieces"

    turns: list[dict] = []
    for i, question in enumerate(["Name three colours.", "Which of them is the warmest?", "Why?"]):
        turns += user(question)
        answer = chat(url, turns)
        out.texts[f"turn {i}"] = text_of(answer)
        out.cached_tokens.append((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        turns.append({"role": "assistant", "content": text_of(answer)})

    out.prompt_tokens = shared_prompt(url, 0, max_completion_tokens=1)["usage"]["prompt_tokens"]
    for _ in range(rounds):
        start = time.monotonic()
        with ThreadPoolExecutor(len(USERS)) as pool:
            answers = list(pool.map(lambda i: shared_prompt(url, i), range(len(USERS))))
        out.rates.append(sum(a["usage"]["completion_tokens"] for a in answers) / (time.monotonic() - start))
        for i, answer in enumerate(answers):
            previous = out.texts.setdefault(f"shared {i}", text_of(answer))
            assert previous == text_of(answer), f"request {i} was answered differently the second time"
    return out
