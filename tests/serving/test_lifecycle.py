"""Hang-ups, full queues, failures, keys, signals: nothing is lost, and each is said in
one line."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from maxlm.serving.server import read_api_key
from tests.errors import message
from tests.serving.fake_engine import FakeEmbedder

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"prompt": "x", "max_tokens": 100}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Gate:
    """Holds an engine's steps until it is opened."""

    def __init__(self, server, after: int = 1):
        self.open, self.closed_at = threading.Event(), threading.Event()
        server.engine.before_step = lambda: (
            server.engine.num_generated >= after and self.wait()
        )

    def wait(self) -> None:
        self.closed_at.set()
        assert self.open.wait(60)


def send_request(server, path: str, body: dict) -> socket.socket:
    """A connection that has sent a request, and waits."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    raw = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    raw.sendall(head.encode() + data)
    return raw


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_frees_its_pages(start_server, streams):
    server = start_server(lambda text, request: "long " * 300)
    gate = Gate(server, after=5)
    with send_request(
        server, "/v1/chat/completions", {**CHAT, "stream": streams, "n": 3}
    ):
        assert gate.closed_at.wait(60)
        assert server.engine.stats().num_free_pages == 97
    wait_until(lambda: not server.loop.num_open)
    gate.open.set()
    wait_until(lambda: not server.engine.sequences)
    assert server.loop.stats.num_free_pages == 100
    assert server.engine.num_generated < 900  # it did not run to its end
    assert not server.loop._streams
    assert (
        server.http.post("/v1/completions", json=PROMPT | {"max_tokens": 1}).status_code
        == 200
    )


def test_embeddings_take_turns_end_with_their_client_and_outlive_a_stop(start_server):
    embedder = FakeEmbedder()
    server = start_server(embedder=embedder)
    embedder.gate = threading.Event()
    embedder.before_text = lambda: embedder.num_done < 3 or embedder.gate.wait(60)
    texts = {"input": ["x"] * 100}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/embeddings", json=texts, timeout=0.5)
    wait_until(lambda: not server.loop.num_open)
    embedder.gate.set()
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 200
    assert embedder.num_done == 4
    embedder.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        embedding = pool.submit(server.http.post, "/v1/embeddings", json=texts)
        wait_until(lambda: server.loop.num_open == 1)
        other = pool.submit(server.http.post, "/v1/completions", json=PROMPT)
        wait_until(lambda: server.loop.num_open == 2)
        server.loop.is_draining = True
        embedder.before_text = lambda: (
            not server.engine.sequences or embedder.waited.append(1)
        )
        embedder.waited = []
        server.engine.before_step = lambda: time.sleep(0.01)
        embedder.gate.set()
        assert embedding.result().status_code == 200
        assert other.result().status_code == 200
    assert 0 < len(embedder.waited) < 100  # sequences went on between texts
    assert server.http.post("/v1/embeddings", json=texts).status_code == 503


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/score"]
)
def test_who_hung_up_before_the_engine_took_notice_leaves_the_queue(start_server, path):
    embedder = FakeEmbedder()
    server = start_server(embedder=embedder, max_open=25)
    gate = threading.Event()
    embedder.before_text = lambda: gate.wait(60)  # holds the engine's thread
    bodies = {
        "/v1/completions": PROMPT,
        "/v1/chat/completions": CHAT | {"stream": True},
    }
    bodies["/v1/score"] = {"text_1": "a", "text_2": "b"}
    with ThreadPoolExecutor(2) as pool:
        embeddings = pool.submit(
            server.http.post, "/v1/embeddings", json={"input": "x"}
        )
        wait_until(lambda: server.loop.num_open == 1)
        waiting = [send_request(server, path, bodies[path]) for _ in range(24)]
        wait_until(lambda: server.loop.num_open == 25)
        for raw in waiting:
            raw.close()
        wait_until(lambda: server.loop.num_open == 1)
        live = pool.submit(server.http.post, "/v1/completions", json=PROMPT)
        wait_until(lambda: server.loop.num_open == 2)
        gate.set()
        assert (live.result().status_code, embeddings.result().status_code) == (
            200,
            200,
        )
    wait_until(lambda: not server.loop.num_open)
    # Nothing of theirs reached the engine, or it is aborted there, in the engine's
    # thread.
    wait_until(lambda: not server.engine.sequences and not server.loop._streams)


def test_sequences_go_on_while_embeddings_compile(start_server):
    embedder = FakeEmbedder()
    compiling, gate = threading.Event(), threading.Event()

    def compile_slowly(shape: tuple[int, ...], pooling: object) -> object:
        compiling.set()
        assert gate.wait(60)
        return embedder.run

    embedder.compile_program = compile_slowly
    server = start_server(embedder=embedder)
    with ThreadPoolExecutor(1) as pool:
        embeddings = pool.submit(
            server.http.post, "/v1/embeddings", json={"input": "x"}
        )
        assert compiling.wait(60)
        assert (
            server.http.post("/v1/completions", json=PROMPT, timeout=30).status_code
            == 200
        )
        gate.set()
        assert embeddings.result().status_code == 200


def test_another_name_of_the_host_is_refused(start_server):
    server = start_server(allowed_hosts={"127.0.0.1", "::1"})
    for host in ("127.0.0.1", "127.0.0.1:1", "[::1]:80", "[::1]"):
        assert server.http.get("/health", headers={"host": host}).status_code == 200
    strange = [
        "evil.example",
        "127.0.0.1@evil.example",
        "[evil]",
        "",
        "127.0.0.1:x",
        "[::1",
    ]
    strange += [
        "127.0.0.1:80:80",
        "127.0.0.1, evil.example",
        "127.0.0.1/x",
        "::1",
        "127.0.0.1 x",
    ]
    for host in strange:
        answer = server.http.get("/health", headers={"host": host})
        assert answer.status_code == 403, host
        assert "start it with an API key" in answer.json()["error"]["message"]


@pytest.mark.heavy
def test_requests_that_do_not_come_are_closed(start_server):
    server = start_server(request_seconds=0.4)
    port = int(server.url.rpartition(":")[2])
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    beginnings = {
        "nothing": b"",
        "part of a head": head,
        "part of a body": head + b"content-length: 100\r\n\r\n{",
        "a path without a body": b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: "
        b"9\r\n\r\n",
    }
    answers: dict[str, bytes] = {}
    for name, data in beginnings.items():
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            raw.sendall(data)
            parts = []
            while part := raw.recv(4096):  # until the server closes
                parts.append(part)
            answers[name] = b"".join(parts)
    assert answers["nothing"] == b""
    for name in ("part of a head", "part of a body"):
        assert answers[name].startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        error = json.loads(answers[name].partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "request_timeout"
    assert answers["a path without a body"].startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: not server.loop.num_open)
    # A connection that is used again, and one whose answer takes longer, are no slow
    # ones.
    server.engine.before_step = lambda: time.sleep(0.15)
    for _ in range(2):
        body = PROMPT | {"max_tokens": 5}
        assert server.http.post("/v1/completions", json=body).status_code == 200


def test_a_full_queue_is_429_and_who_waits_is_served(start_server):
    server = start_server(max_open=6)
    gate = Gate(server, after=0)
    with ThreadPoolExecutor(6) as pool:
        running = [
            pool.submit(server.http.post, "/v1/completions", json=PROMPT)
            for _ in range(6)
        ]
        wait_until(lambda: server.loop.num_open == 6)
        refused = server.http.post("/v1/completions", json=PROMPT)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        gate.open.set()
        assert [answer.result().status_code for answer in running] == [200] * 6
    # More than the queue holds, when nothing else runs.
    many = server.http.post("/v1/completions", json=PROMPT | {"n": 8})
    assert len(many.json()["choices"]) == 8


def test_an_engine_that_fails_ends_its_requests_and_goes_on(start_server, capfd):
    server = start_server()

    def fail():
        server.engine.before_step = lambda: None
        raise RuntimeError("out of\nmemory")

    server.engine.before_step = fail
    answer = server.http.post("/v1/completions", json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert (
        capfd.readouterr().err
        == "error: the engine failed: RuntimeError: out of memory\n"
    )
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 200
    server.engine.before_step = fail
    with server.http.stream(
        "POST", "/v1/completions", json={**PROMPT, "stream": True}
    ) as stream:
        *_, last = [line for line in stream.iter_lines() if line]
    assert (
        "the engine failed"
        in json.loads(last.removeprefix("data: "))["error"]["message"]
    )

    def fail_for_good(*_):
        raise RuntimeError("lost")

    server.engine.before_step = server.engine.abort = fail_for_good
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 500
    assert server.http.get("/health").status_code == 503
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 500


def test_the_key_opens_all_but_the_page_and_health(start_server):
    server = start_server(api_key="s3cret")
    assert server.client.models.list().data[0].id == "fake"
    for path in ("/", "/health"):
        assert server.http.get(path).status_code == 200
    for key in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
        for path in ("/v1/models", "/metrics"):
            answer = server.http.get(path, headers=key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                401,
                "invalid_api_key",
            )
        assert (
            server.http.post("/v1/completions", json=PROMPT, headers=key).status_code
            == 401
        )


def test_metrics_count_tokens_requests_and_latencies(start_server):
    server = start_server(lambda text, request: "abc")
    server.http.post("/v1/completions", json=PROMPT | {"n": 2})
    server.http.post("/v1/completions", json={})
    lines = server.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    expected = {
        "maxlm_generated_tokens_total": 8,
        "maxlm_prompt_tokens_total": 2,
        "maxlm_num_free_pages": 100,
        "maxlm_time_to_first_token_seconds_count": 2,
        "maxlm_inter_token_seconds_count": 6,
        'maxlm_requests_total{code="200",path="/v1/completions"}': 1,
        'maxlm_requests_total{code="400",path="/v1/completions"}': 1,
    }
    assert {name: float(values[name]) for name in expected} == expected


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MAXLM_API_KEY", "outer")
    assert read_api_key(None) == "outer"
    file = tmp_path / "key"
    file.write_text("inner\n")
    assert read_api_key(file) == "inner"
    file.write_text("\n")
    assert "the key is empty" in message(read_api_key, file)


@pytest.mark.heavy
def test_sigterm_finishes_what_runs_and_refuses_what_comes():
    command = [sys.executable, "-m", "tests.serving.serve_fake"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        subprocess.Popen(command, text=True, **pipes) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        url = running.stdout.readline().strip()
        answer = pool.submit(
            httpx.post, f"{url}/v1/completions", json=PROMPT, timeout=60
        )
        running.stdin.write("\n")
        running.stdin.flush()
        wait_until(lambda: "maxlm_num_running 1.0" in httpx.get(f"{url}/metrics").text)
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert httpx.post(f"{url}/v1/completions", json=PROMPT).status_code == 503
        assert not answer.done()
        running.stdin.close()
        assert answer.result().json()["choices"][0]["text"] == "abcdef"
        assert running.wait(60) == 0
        assert running.stderr.read() == "finishing 1 that run; Ctrl-C ends now\n"


@pytest.mark.more
@pytest.mark.heavy
def test_a_second_sigterm_ends_at_once_without_a_traceback():
    command = [sys.executable, "-m", "tests.serving.serve_fake"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        subprocess.Popen(command, text=True, **pipes) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        url = running.stdout.readline().strip()
        body = PROMPT | {"stream": True}
        pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        running.stdin.write("\n")
        running.stdin.flush()
        wait_until(lambda: "maxlm_num_running 1.0" in httpx.get(f"{url}/metrics").text)
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        running.send_signal(signal.SIGTERM)
        assert running.stderr.readline() == "finishing 1 that run; Ctrl-C ends now\n"
        threading.Timer(2, running.stdin.close).start()  # the engine's step ends
        assert running.stderr.read() == ""
        assert running.wait(60) == 0
