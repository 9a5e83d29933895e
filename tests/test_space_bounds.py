"""What strangers send to a Space: each request and all that is stored is bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from spark_vl.space import app


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """Small bounds, and the folder of the uploads."""
    for name, value in (("MAX_BODY", 100), ("_MAX_UPLOAD", 1000), ("MAX_STORED_BYTES", 3000), ("_FILES_AT_ONCE", 2)):
        monkeypatch.setattr(app, name, value)
    monkeypatch.setattr(app, "MAX_STORED_FILES", 6)
    return tmp_path


def store(folder: Path):
    """An app that stores whole bodies, behind the bounds."""

    async def answer(scope, receive, send):
        body = await Request(scope, receive).body()
        (folder / str(len(list(folder.iterdir())))).write_bytes(body)
        await PlainTextResponse("stored")(scope, receive, send)

    return app.Bounds(answer, folder)


async def send(bounds, path: str, body, headers=None) -> int:
    transport = httpx.ASGITransport(bounds)
    async with httpx.AsyncClient(transport=transport, base_url="http://space") as client:
        return (await client.post(path, content=body, headers=headers)).status_code


async def chunks(size: int, chunk: int = 10):
    for _ in range(0, size, chunk):
        yield b"x" * chunk


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/call/ask", "/anything"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_request_has_a_size(small, path, declared):
    limit = 1000 if "upload" in path else 100
    for size, status in ((limit, 200), (limit + 10, 413)):
        body = b"x" * size if declared else chunks(size)
        assert asyncio.run(send(store(small), path, body)) == status
    assert sum(file.stat().st_size for file in small.iterdir()) == limit


def test_a_false_length_is_no_way_in(small):
    assert asyncio.run(send(store(small), "/upload", chunks(2000), {"content-length": "5"})) == 413


@pytest.mark.parametrize("size", [1000, 1])
def test_all_uploads_together_have_a_size_and_a_number(small, size):
    bounds = store(small)
    statuses = [asyncio.run(send(bounds, "/upload", b"x" * size)) for _ in range(20)]
    assert statuses == [200] * statuses.count(200) + [507] * statuses.count(507)
    assert statuses.count(200) == (3 if size == 1000 else 5)  # 2 of 6 files must be free
    assert sum(file.stat().st_size for file in small.iterdir()) <= 3000
    assert len(list(small.iterdir())) <= 6
    for file in small.iterdir():
        file.unlink()
    assert asyncio.run(send(bounds, "/upload", b"x")) == 200


def test_uploads_on_their_way_count(small):
    async def all_at_once() -> list[int]:
        gate = asyncio.Event()

        async def slow():
            yield b"x" * 500
            await gate.wait()
            yield b"x" * 500

        bounds = store(small)
        sent = [asyncio.create_task(send(bounds, "/upload", slow())) for _ in range(10)]
        await asyncio.sleep(0.5)
        gate.set()
        return await asyncio.gather(*sent)

    statuses = asyncio.run(all_at_once())
    assert statuses.count(200) == 3
    assert statuses.count(507) == 7


def test_a_request_does_not_take_for_ever(small, monkeypatch):
    monkeypatch.setattr(app, "MAX_UPLOAD_S", 0.2)
    bounds = store(small)

    async def slow_body() -> list[dict]:
        sent = []
        first = [{"type": "http.request", "body": b"x", "more_body": True}]

        async def receive():
            return first.pop() if first else await asyncio.sleep(30)

        async def note(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/upload", "headers": [], "query_string": b""}
        await bounds(scope, receive, note)
        return sent

    assert asyncio.run(slow_body())[0]["status"] == 408
    assert bounds._running == 0


def test_an_address_is_not_fetched():
    for path in ("http://127.0.0.1/x.png", "https://example.org/x.png", "ftp://x", "file:///etc/passwd"):
        with pytest.raises(app.gr.Error, match="upload the image itself"):
            asyncio.run(app._uploaded(path))
    assert asyncio.run(app._uploaded("/uploads/x.png")) == "/uploads/x.png"
