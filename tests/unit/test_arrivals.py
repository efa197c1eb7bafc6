"""Arrivals of bench_serve.py --load: what is sent when, and what is made of the answers. The server is a stand-in."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import needs
import pytest

needs.sglang()  # aiohttp comes with it

import arrivals
import serve_report
import serving
from aiohttp import web

ROW = serve_report.parse_row("1x2:8+4:128")


class StreamingServer:
    """Answers /generate with one token at once and two more, in one event, after ``pause`` seconds."""

    pause = 0.05

    def __init__(self) -> None:
        self.arrived: list[tuple[float, list[int]]] = []
        self.port = serving.free_port()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port).start())
        self._ready.set()
        self._loop.run_forever()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.arrived.append((time.monotonic(), body["input_ids"]))
        if body["input_ids"] == [0]:
            return web.Response(status=400, text="no such prompt")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for tokens in (1, 3):
            event = {"output_ids": body["input_ids"][:1] * tokens, "meta_info": {"completion_tokens": tokens}}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(self.pause)
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def server() -> Iterator[StreamingServer]:
    server = StreamingServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def clients() -> Iterator[arrivals.Clients]:
    with arrivals.Clients() as clients:
        yield clients


def test_percentiles_are_in_milliseconds():
    assert arrivals.percentiles([i / 1000 for i in range(101)]) == {"p50_ms": 50.0, "p99_ms": 99.0}


def test_clients_send_at_the_times_and_answer_in_order(server, clients):
    times = [0.0, 0.4, 0.8, 0.8, 1.2, 1.6]
    bodies = [serving.encode([i + 1], 3, stream=True) for i in range(6)]
    clients.send(server.url, bodies, times)  # processes that are starting are late
    server.arrived.clear()
    answers = clients.send(server.url, bodies, times)
    assert [answer.output_ids for answer in answers] == [[i + 1] * 3 for i in range(6)]
    begin = min(at for at, _ in server.arrived)
    arrived = {ids[0] - 1: at - begin for at, ids in server.arrived}
    assert [arrived[i] for i in range(6)] == pytest.approx(times, abs=0.25)


def test_tokens_of_one_event_arrive_together(server, clients):
    (answer,) = clients.send(server.url, [serving.encode([7], 3, stream=True)], [0.0])
    first, second = answer.gaps
    assert len(answer.arrivals) == 3 and first >= 0.8 * server.pause and second == 0


def test_a_request_that_fails_stops_the_measurement(server, clients):
    with pytest.raises(RuntimeError, match="1 of 2 requests failed, the first with: 400: no such prompt"):
        clients.send(server.url, [serving.encode([i], 3, stream=True) for i in range(2)], [0.0, 0.0])


def test_arriving_prompts_are_the_rows_but_for_their_last_tokens():
    prompts, arriving = ROW.prompts(), arrivals.arriving(ROW, 5, seed=0)
    assert [p[: -arrivals.NEW_TOKENS] for p in arriving] == [prompts[i % 2][: -arrivals.NEW_TOKENS] for i in range(5)]
    assert len({tuple(p) for p in arriving}) == 5 and {len(p) for p in arriving} == {12}
    assert arriving == arrivals.arriving(ROW, 5, seed=0) != arrivals.arriving(ROW, 5, seed=1)
    cold = serve_report.parse_row("2x1:8+0:16:cold")
    assert arrivals.arriving(cold, 3, seed=0) == [*cold.prompts(), cold.prompts()[0]]


def test_schedule_has_the_rate_asked_for():
    times = arrivals.schedule(1000, 20.0, seed=0)
    assert times[0] == 0.0 and times == sorted(times) and times == arrivals.schedule(1000, 20.0, seed=0)
    assert times[-1] == pytest.approx(50, rel=0.15)


def test_servers_take_the_same_arrivals_in_turn(monkeypatch):
    calls = []

    class FakeClients:
        def send(self, url: str, bodies: list[bytes], times: list[float]) -> list[serving.Answer]:
            seed = next(seed for seed in range(3) if times == arrivals.schedule(30, 10.0, seed))
            calls.append((url, seed, bodies))
            first = 0.1 if url == "a" else 0.2
            return [serving.Answer(arrivals=[first, first + 0.01 * (seed + 1)]) for _ in bodies]

    monkeypatch.setattr(serving.Server, "post", lambda server, path: calls.append((server.url, path, None)))
    servers = {url: serving.Server(url, None, None) for url in ("a", "b")}
    figures = arrivals.load(
        FakeClients(),
        servers,
        ROW,
        warm=lambda server, row: calls.append((server.url, "warm", None)),
        tokens_per_second=1280.0,
        seconds=3.0,
        rounds=2,
    )
    before = [(url, step) for url in ("a", "b") for step in ("warm", 2, "/freeze_gc")]
    assert [(url, step) for url, step, _ in calls] == [*before, ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert {url: bodies for url, step, bodies in calls if step == 1}["a"] == calls[-1][2]
    assert figures["b"]["requests"] == 60
    assert figures["b"]["ttft"]["p50_ms"] == pytest.approx(200)
    assert [x["itl"]["p99_ms"] for x in figures["a"]["rounds"]] == pytest.approx([10, 20])
    assert figures["a"]["itl"]["p99_ms"] == pytest.approx(20)
