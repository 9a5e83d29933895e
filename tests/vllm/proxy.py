"""A rollout server that is told to misbehave: real HTTP in front of a real vLLM server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

Change = Callable[[dict[str, Any]], dict[str, Any]]


class Proxy:
    """Passes requests on to `target`, but for the next `faults`, of which each completion request takes one.

    A fault is a number (that status), `drop` (the connection is closed), `slow` (five seconds pass first), or a
    function that changes the answer.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults: list[int | str | Change] = []
        self.closed = False
        self.asked: list[dict[str, Any]] = []
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Says nothing."""

            def do_GET(self) -> None:
                self._answer(httpx.get(proxy.target + self.path, timeout=60))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = None
                if self.path == "/inference/v1/generate":
                    with lock:
                        proxy.asked.append(json.loads(body))
                        fault = proxy.faults.pop(0) if proxy.faults else None
                if fault == "drop" or proxy.closed:
                    self.close_connection = True
                    self.connection.close()
                    return
                if fault == "slow":
                    threading.Event().wait(5)
                if isinstance(fault, int):
                    self._write(fault, b'{"error": {"message": "told to fail"}}')
                    return
                headers = {"Content-Type": "application/json"}
                answer = httpx.post(proxy.target + self.path, content=body, headers=headers, timeout=60)
                if callable(fault):
                    self._write(200, json.dumps(fault(answer.json())).encode())
                else:
                    self._answer(answer)

            def _answer(self, answer: httpx.Response) -> None:
                self._write(answer.status_code, answer.content)

            def _write(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Connections that are open stay so, and are closed at the next request."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()
