"""What `hira push` sends to a server, and what it makes of the answers; a real server is in test_vllm."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from commands import run_in_this_process

from hira import HiraError
from hira.serving.push import push

PAUSE, RPC, RESUME = "/pause?mode=wait", "/collective_rpc", "/resume"


class Fake:
    """A server that notes what it gets; `refusals` are the status and the answer by the method, or the path."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        self.workers = 1
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, content))
                status, answer = fake.refusals.get(content.get("method", self.path), (200, "{}"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer.encode())

            def do_GET(self) -> None:
                assert self.path == "/get_world_size"
                self.send_response(200 if fake.workers else 404)
                self.end_headers()
                self.wfile.write(json.dumps({"world_size": fake.workers}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def fake() -> Iterator[Fake]:
    found = Fake()
    thread = Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def test_weights_are_loaded_between_two_requests(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    push(["a", "owner/name"], f"{fake.url}/", weights=[1, 0.5], any_base=True)
    extra = {"adapters": [str(tmp_path / "a"), "owner/name"], "weights": [1.0, 0.5], "any_base": True}
    config = {"load_config": {"load_format": "hira", "model_loader_extra_config": extra}}
    assert fake.requests == [
        (PAUSE, {}),
        (RPC, {"method": "update_config", "args": [config]}),
        (RPC, {"method": "reload_weights"}),
        (RESUME, {}),
    ]


@pytest.mark.parametrize("method", ["update_config", "reload_weights"])
def test_a_server_that_refuses_goes_on(fake, method):
    fake.refusals[method] = 500, json.dumps({"error": {"message": "tensor 'x' has a NaN"}})
    with pytest.raises(HiraError, match=r"127\.0\.0\.1.*tensor 'x' has a NaN"):
        push(["a"], fake.url)
    assert fake.requests[-1] == (RESUME, {})


def test_a_server_that_refuses_and_does_not_go_on(fake):
    fake.refusals = {"reload_weights": (500, "tensor 'x' has a NaN"), RESUME: (500, "busy")}
    with pytest.raises(HiraError, match=r"(?s)tensor 'x' has a NaN.*still wait.*busy"):
        push(["a"], fake.url)


def test_a_server_without_the_endpoints(fake):
    fake.workers = 0
    with pytest.raises(HiraError, match="VLLM_SERVER_DEV_MODE=1"):
        push(["a"], fake.url)
    assert fake.requests == []


def test_a_server_of_several_workers_is_left_alone(fake):
    fake.workers = 2
    with pytest.raises(HiraError, match=r"2.*restart"):
        push(["a"], fake.url)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("adapters", "options", "named"),
    [
        ([], {}, "no adapter"),
        (["a"], {"weights": [1, 2]}, "weights"),
        (["a"], {"weights": [float("nan")]}, "weights"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_reaches_no_server(adapters, options, named, fake):
    with pytest.raises(HiraError, match=named):
        push(adapters, fake.url, **options)
    assert fake.requests == []


def test_the_command(fake):
    done = run_in_this_process("push", "owner/a", "owner/b", "--to", fake.url, "--weight", 1, "--weight", 2)
    assert (done.returncode, done.stdout.split()[0]) == (0, fake.url)
    sent = fake.requests[1][1]["args"][0]["load_config"]["model_loader_extra_config"]
    assert sent == {"adapters": ["owner/a", "owner/b"], "weights": [1.0, 2.0]}
    fake.refusals["reload_weights"] = 500, "tensor 'x' has a NaN"
    done = run_in_this_process("push", "owner/a", "--to", fake.url)
    assert done.returncode == 1
    assert "tensor 'x' has a NaN" in done.stderr


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(HiraError, match=f"{url} cannot be reached"):
        push(["a"], url)
    for address in ("localhost:8000", "file:///etc", ""):
        with pytest.raises(HiraError, match="not the address of a server"):
            push(["a"], address)
