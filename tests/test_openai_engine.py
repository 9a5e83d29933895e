"""The OpenAI-compatible back-end against an HTTP server that behaves as it is told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from spark_vl.config import ConfigError, EvalConfig, ModelConfig, OpenAIConfig, RolloutConfig, TrainConfig
from spark_vl.config_check import check_eval_config, check_train_config
from spark_vl.data.images import load_image
from spark_vl.records import BadRecordError, ImageRef, ImageSize, Message
from spark_vl.rollout import EngineError, PromptsRefusedError, Sampling, load_sampler, openai_engine
from spark_vl.rollout.openai_engine import OpenAIEngine, RemotePrompts, content_of, read_completion
from tests.conftest import make_image, make_record

KEY = "sk-very-secret"
GREEDY = Sampling(0.0, max_new_tokens=16)


def reply(content: str | None = "7", finish_reason: str = "stop", tokens: int = 3, **message: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish_reason,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}


class Said(Exception):
    """What the server answers in place of a completion."""

    def __init__(self, status: int, text: str = "no", **headers: str) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


class Server(ThreadingHTTPServer):
    """`answer` gives the JSON of a reply, raises `Said`, or returns None: the connection is cut."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.headers = answer, [], []
        self.models: dict[str, Any] | None = None
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is what some tests want."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.send(200 if self.server.models else 404, self.server.models or {"detail": "Not Found"})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            answer = self.server.answer(body)
        except Said as said:
            self.send(said.status, said.text, said.headers)
        else:
            if answer is None:
                self.close_connection = True
            else:
                self.send(200, answer)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(openai_engine, "FIRST_WAIT_S", 0.01)


def engine_at(server: Server, **settings: Any) -> OpenAIEngine:
    return OpenAIEngine(OpenAIConfig(base_url=server.url, **{"retries": 2, "timeout_s": 10.0, **settings}), "tiny")


def prompts(*texts: str) -> list[Any]:
    return [RemotePrompts().process(make_record(text, text)) for text in texts]


def said_last(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def echo(body: dict[str, Any]) -> dict[str, Any]:
    return reply(f"I was asked: {said_last(body)}", tokens=len(said_last(body)))


# ── what is asked ──


def test_groups_come_in_order_each_completion_with_a_request_and_a_seed_of_its_own():
    told, groups_of, caller = [], {}, threading.get_ident()

    def on_group(i, group):
        assert threading.get_ident() == caller
        groups_of[i] = group

    with serving(echo) as server:
        found = engine_at(server).generate(
            prompts("a", "bb", "ccc"), 4, Sampling(0.5, 0.9, 16, seed=3), told.append, on_group
        )
        again = engine_at(server).generate(prompts("a", "bb", "ccc"), 4, Sampling(0.5, 0.9, 16, seed=3))
    assert [[r.text for r in group.rollouts] for group in found] == [
        [f"I was asked: {t}"] * 4 for t in ("a", "bb", "ccc")
    ]
    assert [group.rollouts[0].tokens for group in found] == [1, 2, 3]
    assert found[0].rollouts[0].token_ids == found[0].rollouts[0].logprobs == ()
    assert told == [1] * 12
    assert groups_of == dict(enumerate(found))
    assert again == found
    first, second = server.asked[:12], server.asked[12:]
    seeds = {(body["seed"], said_last(body)) for body in first}
    assert len({seed for seed, _ in seeds}) == 12
    assert max(seed for seed, _ in seeds) < 2**31
    assert seeds == {(body["seed"], said_last(body)) for body in second}
    fields = {name: value for name, value in first[0].items() if name not in ("seed", "messages")}
    assert fields == {"model": "tiny", "temperature": 0.5, "top_p": 0.9, "max_tokens": 16}


def test_a_greedy_request_has_no_seed_and_a_penalty_only_where_there_is_one():
    with serving(echo) as server:
        engine_at(server, model="its-name").generate(prompts("a"), 1, GREEDY)
        engine_at(server).generate(prompts("a"), 1, Sampling(0.0, max_new_tokens=16, repetition_penalty=1.3))
    assert server.asked[0] == {
        "model": "its-name",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 16,
    }
    assert server.asked[1] == {**server.asked[0], "model": "tiny", "repetition_penalty": 1.3}


@pytest.mark.parametrize(("owner", "extended"), [("vllm", True), ("sglang", True), ("openai", False), (None, False)])
def test_servers_that_would_take_the_checkpoints_own_settings_are_told_all(owner, extended):
    with serving(echo) as server:
        server.models = {"object": "list", "data": [{"id": "tiny", "owned_by": owner}]}
        engine_at(server).generate(prompts("a"), 1, GREEDY)
    own = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert own.items() <= server.asked[0].items() if extended else not own.keys() & server.asked[0].keys()


def test_messages_keep_their_roles_and_images_their_places():
    a, b = make_image(1), make_image(2)
    record = make_record(
        "r", messages=(Message("system", ("Be brief.",)), Message("user", ("See ", a, "and", b, "Add.")))
    )
    with serving(lambda body: reply()) as server:
        engine_at(server).generate([RemotePrompts().process(record)], 1, GREEDY)
    [body] = server.asked
    parts = body["messages"][1]["content"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in parts[::2]] == ["See ", "and", "Add."]
    assert [sent(part) for part in parts[1::2]] == [("png", a.data), ("png", b.data)]


def sent(part: dict[str, Any]) -> tuple[str, bytes]:
    """Format and bytes of an image in a message."""
    header, encoded = part["image_url"]["url"].split(";base64,")
    return header.removeprefix("data:image/"), base64.b64decode(encoded)


def image_file(format: str, mode: str = "RGB", **settings: Any) -> bytes:
    gradient = Image.linear_gradient("L").resize((48, 32))
    image = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).convert(mode)
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_file("JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (image_file("PNG"), "png"),
        (image_file("PNG", "P"), "png"),
        (image_file("PNG", "L"), "png"),
        (image_file("JPEG", exif=Image.Exif()), "jpeg"),
        (image_file("WEBP", lossless=True), "webp"),
        (image_file("BMP"), None),
        (image_file("JPEG", "CMYK"), None),
        (image_file("PNG", "RGBA"), None),
        (image_file("PNG", "I;16"), None),
        (image_file("PNG", "L", transparency=128), None),
        (rotated(), None),
    ],
    ids=["png", "palette", "gray", "jpeg", "webp", "bmp", "cmyk", "alpha", "16 bits", "color key", "rotated"],
)
def test_an_image_is_sent_as_it_is_where_all_readers_agree_and_else_as_we_read_it(data, kept):
    ref = ImageRef(data=data)
    format, file = sent(content_of((ref,))[0])
    assert (format, file == data) == ((kept, True) if kept else ("png", False))
    with Image.open(io.BytesIO(file)) as image:
        assert image.convert("RGB").tobytes() == load_image(ref).tobytes()
        assert image.size == load_image(ref).size


def test_prompts_know_the_sizes_and_refuse_what_cannot_be_read(tmp_path):
    (tmp_path / "rotated.jpg").write_bytes(rotated())
    file = ImageRef("rotated.jpg", str(tmp_path))
    prompt = RemotePrompts().process(make_record("r", file, make_image(1), "?"))
    assert prompt.record.image_sizes == (ImageSize((32, 48), (32, 48)), ImageSize((56, 56), (56, 56)))
    assert (len(prompt.input_ids), prompt.images, prompt.record.coordinates) == (0, (), None)
    with pytest.raises(BadRecordError, match=r"^r: image ImageRef\('\.\./x\.png'\): "):
        RemotePrompts().process(make_record("r", ImageRef("../x.png", str(tmp_path)), "?"))
    with pytest.raises(BadRecordError, match=r"^r: image ImageRef\(9 bytes\): "):
        RemotePrompts().process(make_record("r", ImageRef(data=b"not an im"), "?"))
    with pytest.raises(BadRecordError, match="not valid Unicode"):
        RemotePrompts().process(make_record("r", "half a pair: \ud83d"))
    (tmp_path / "rotated.jpg").unlink()
    with serving(lambda body: reply()) as server, pytest.raises(PromptsRefusedError, match="is not a file"):
        engine_at(server).generate([prompt], 1, GREEDY)


def test_no_more_requests_than_allowed_are_under_way_and_none_is_encoded_before(monkeypatch):
    encoded, beyond, done = [], [], []
    together = threading.Barrier(3, timeout=10)
    plain = openai_engine.content_of
    monkeypatch.setattr(openai_engine, "content_of", lambda content: (encoded.append(1), plain(content))[1])

    def answer(body):
        together.wait()
        beyond.append(len(encoded) - len(done))
        together.wait()
        done.append(1)
        return reply()

    with serving(answer) as server:
        engine_at(server, concurrency=3).generate(prompts(*map(str, range(12))), 1, GREEDY)
    assert server.most == 3
    assert max(beyond) == 3
    assert len(encoded) == 12


# ── what comes back ──


@pytest.mark.parametrize(
    ("answer", "text", "answer_text", "finish_reason"),
    [
        (reply("7"), "7", "7", "stop"),
        (reply("7 and", "length"), "7 and", "7 and", "length"),
        (reply(None), "", "", "stop"),
        (reply("", "content_filter"), "", "", "stop"),
        (reply(None, refusal="I cannot."), "I cannot.", "I cannot.", "stop"),
        (reply(None, "tool_calls", tool_calls=[{"function": {"name": "f"}}]), "", "", "stop"),
        (reply("7", reasoning_content="3 + 4."), "3 + 4.\n\n7", "7", "stop"),
        (reply("7", reasoning="3 + 4.", reasoning_content=None), "3 + 4.\n\n7", "7", "stop"),
        (reply(None, "length", reasoning_content="3 +"), "3 +", "", "length"),
        (reply("<think>3 + 4</think>\n\n7"), "<think>3 + 4</think>\n\n7", "7", "stop"),
        (reply("<think>3 +", "length"), "<think>3 +", "", "length"),
    ],
)
def test_replies(answer, text, answer_text, finish_reason):
    rollout = read_completion(answer)
    assert (rollout.text, rollout.answer_text, rollout.finish_reason) == (text, answer_text, finish_reason)
    assert rollout.tokens == 3


ODD = {
    "no JSON": "<html>a gateway</html>",
    "a list": [],
    "an error": {"error": {"message": "upstream is down", "code": 502}},
    "no choices": {**reply(), "choices": []},
    "two choices": {**reply(), "choices": reply()["choices"] * 2},
    "no usage": {"choices": reply()["choices"]},
    "odd usage": {**reply(), "usage": {"completion_tokens": "3"}},
    "odd content": reply([{"type": "text"}]),
    "odd end": reply("7", "abort"),
    "deep": "[" * 200_000,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_reply_is_asked_for_again_and_shown_in_the_end(odd):
    answers = iter([odd, odd, reply("7")])
    with serving(lambda body: next(answers)) as server:
        [group] = engine_at(server).generate(prompts("a"), 1, GREEDY)
    assert group.rollouts[0].text == "7"
    with serving(lambda body: odd) as server, pytest.raises(EngineError, match=r"/chat/completions: the .*; 3 tries"):
        engine_at(server).generate(prompts("a"), 1, GREEDY)
    assert len(server.asked) == 3


# ── what fails ──


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(status):
    failures = iter([True, True, False])

    def answer(body):
        if next(failures):
            raise Said(status, "busy")
        return reply()

    with serving(answer) as server:
        assert engine_at(server).generate(prompts("a"), 1, GREEDY)[0].rollouts[0].text == "7"
    with serving(lambda body: fail(Said(status, "busy"))) as server:
        with pytest.raises(EngineError, match=rf"status {status}: busy; 3 tries"):
            engine_at(server).generate(prompts("a"), 1, GREEDY)
        assert len(server.asked) == 3


def fail(error: Exception) -> Any:
    raise error


def test_cut_connections_and_hanging_servers_are_tried_again_and_named():
    answers = iter([None, "hang", reply()])

    def answer(body):
        found = next(answers)
        if found == "hang":
            time.sleep(0.5)
        return found

    with serving(answer) as server:
        assert engine_at(server, timeout_s=0.2).generate(prompts("a"), 1, GREEDY)[0].rollouts[0].text == "7"
    with serving(lambda body: None) as server, pytest.raises(EngineError, match=r"RemoteProtocolError: .*; 3 tries"):
        engine_at(server).generate(prompts("a"), 1, GREEDY)
    with (
        serving(lambda body: time.sleep(0.4)) as server,
        pytest.raises(EngineError, match=r"ReadTimeout: .*; 1 tries"),
    ):
        engine_at(server, timeout_s=0.1, retries=0).generate(prompts("a"), 1, GREEDY)
    with pytest.raises(EngineError, match=r"ConnectError: .*; 3 tries"):
        engine_at(server).generate(prompts("a"), 1, GREEDY)  # it is gone


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_wants_to_be_left_alone_is_and_not_for_hours(form):
    times = []

    def answer(body):
        times.append(time.time())
        if len(times) == 1:
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
            raise Said(429, "slow down", Retry_After="1" if form == "seconds" else date)
        return reply()

    with serving(answer) as server:
        engine_at(server).generate(prompts("a"), 1, GREEDY)
    assert times[1] - times[0] >= 0.99
    with serving(lambda body: fail(Said(429, "no money", Retry_After="86400"))) as server:
        with pytest.raises(EngineError, match="no money; it asks to wait 86400 s"):
            engine_at(server).generate(prompts("a"), 1, GREEDY)
        assert len(server.asked) == 1


def test_a_rate_limit_is_no_failure_while_others_get_through():
    """32 requests at once at a server that takes one each 10 ms would else run out of tries."""
    last = [0.0]

    def answer(body):
        with server.lock:
            if time.monotonic() - last[0] < 0.01:
                raise Said(429, "slow down")
            last[0] = time.monotonic()
        return reply()

    with serving(answer) as server:
        groups = engine_at(server).generate(prompts(*map(str, range(64))), 1, GREEDY)
    assert len(groups) == 64
    assert len(server.asked) > 64


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_leaves_the_others_sampled(status):
    def answer(body):
        if "long" in said_last(body):
            raise Said(status, "the prompt has 300 tokens; at most 256")
        return reply()

    told: list[int] = []
    with serving(answer) as server, pytest.raises(PromptsRefusedError) as caught:
        engine_at(server).generate(prompts("a", "too long", "b"), 2, GREEDY, on_group=lambda i, _: told.append(i))
    assert [group and len(group.rollouts) for group in caught.value.groups] == [2, None, 2]
    assert list(caught.value.reasons) == [1]
    assert caught.value.reasons[1].record_id == "too long"
    assert f"refuses the prompt: status {status}: the prompt has 300 tokens" in caught.value.reasons[1].reason
    assert sorted(told) == [0, 2]


def test_a_server_that_refuses_what_every_request_asks_is_not_blamed_on_the_prompts():
    def answer(body):
        if "repetition_penalty" in body:
            raise Said(400, "Unrecognized request argument supplied: repetition_penalty")
        if isinstance(said_last(body), list):
            raise Said(400, "this model has no eyes")
        return reply()

    with serving(answer) as server:
        penalized = Sampling(0.0, max_new_tokens=16, repetition_penalty=1.05)
        with pytest.raises(EngineError, match=r"any prompt: status 400: Unrec.*know a repetition_penalty\?"):
            engine_at(server).generate(prompts("a", "b"), 1, penalized)
        record = make_record("r", make_image(1), "?")
        with pytest.raises(EngineError, match="any prompt with an image: status 400: this model has no eyes"):
            engine_at(server).generate([*prompts("a"), RemotePrompts().process(record)], 1, GREEDY)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"status 401: wrong key …; the key in env:SPARK_TEST_KEY \(rollout\.openai\.token_from\)"),
        (403, r"does it allow the model 'tiny'\?"),
        (404, r"is there the model 'tiny' \(rollout\.openai\.model\), and does rollout\.openai\.base_url"),
        (307, r"status 307: wrong key …$"),
    ],
)
def test_what_a_person_has_to_repair_is_said_at_once_and_without_the_key(monkeypatch, capfd, caplog, status, says):
    monkeypatch.setenv("SPARK_TEST_KEY", KEY)
    caplog.set_level("DEBUG")
    with serving(lambda body: fail(Said(status, f"wrong key {KEY}"))) as server:
        engine = engine_at(server, token_from="env:SPARK_TEST_KEY")
        with pytest.raises(EngineError, match=says) as caught:
            engine.generate(prompts("a"), 1, GREEDY)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    error: BaseException | None = caught.value
    while error:
        assert KEY not in str(error)
        error = error.__cause__
    assert KEY not in repr(vars(engine)["settings"])
    assert KEY not in "".join([*capfd.readouterr(), caplog.text])
    assert len(server.asked) == 1


def test_after_a_failure_nothing_more_is_asked_and_what_was_done_was_given():
    def answer(body):
        if said_last(body) == "3":
            raise Said(401)
        time.sleep(0.02)
        return reply()

    done = []
    with serving(answer) as server:
        with pytest.raises(EngineError, match="no key was sent"):
            engine_at(server, concurrency=1).generate(
                prompts(*"0123456789"), 1, GREEDY, on_group=lambda i, _: done.append(i)
            )
        assert (done, server.texts) == ([0, 1, 2], ["0", "1", "2", "3"])


def test_an_interrupt_ends_at_once():
    hanging = threading.Event()

    def answer(body):
        hanging.set()
        time.sleep(3)
        return reply()

    with serving(answer) as server:
        threading.Thread(target=lambda: (hanging.wait(), time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT))).start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine_at(server, concurrency=4).generate(prompts(*"0123456789"), 1, GREEDY)
        assert time.monotonic() - begun < 1.5
        assert len(server.asked) <= 4


def test_a_callers_error_ends_it_too_and_a_running_loop_does_not_matter():
    async def within() -> int:
        return len(engine_at(server).generate(prompts("a", "b"), 1, GREEDY))

    with serving(echo) as server:
        assert asyncio.run(within()) == 2
        with pytest.raises(RuntimeError, match="of the caller"):
            engine_at(server).generate(
                prompts("a"), 1, GREEDY, on_group=lambda i, g: fail(RuntimeError("of the caller"))
            )
        assert engine_at(server).generate([], 1, GREEDY) == []


# ── settings ──


def test_load_sampler_gives_the_server_without_looking_at_the_model():
    with serving(echo) as server:
        rollout = RolloutConfig(engine="openai", openai=OpenAIConfig(base_url=server.url))
        loaded = load_sampler(ModelConfig("nobody/knows"), rollout, max_prompt_tokens=9, max_new_tokens=9)
        prompt = loaded.prompts.process(make_record("r", "a"))
        [group] = loaded.sampler.generate([prompt], 1, GREEDY)
    assert (loaded.processor, loaded.policy) == (None, None)
    assert group.rollouts[0].text == "I was asked: a"
    assert server.asked[0]["model"] == "nobody/knows"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, r"^rollout\.openai\.base_url: is null; name the server"),
        ({"base_url": "localhost:8000/v1"}, r"found 'localhost:8000/v1'; allowed: http://HOST:PORT/v1"),
        ({"base_url": "http://h:port/v1"}, r"^rollout\.openai\.base_url: Port could not be cast"),
        ({"base_url": "http://me:secret@h/v1"}, r"^rollout\.openai\.base_url: holds a user, (?!.*secret)"),
        ({"base_url": "http://h/v1?key=secret"}, r"or query, (?!.*secret)"),
        ({"base_url": "http://h/v1", "token_from": KEY}, r"token_from: found a token itself; allowed: env:NAME"),
        ({"base_url": "http://h/v1", "token_from": "env:NOT_SET"}, r"token_from: .*'NOT_SET' is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(settings, says):
    config = EvalConfig()
    config.evaluation.recipes, config.rollout.engine = ["digits"], "openai"
    config.rollout.openai = OpenAIConfig(**settings)
    with pytest.raises(ConfigError, match=says):
        check_eval_config(config)


def test_training_is_refused_in_words():
    config = TrainConfig()
    config.data.recipes, config.rollout.engine = ["digits"], "openai"
    config.rollout.openai.base_url = "http://h/v1"
    with pytest.raises(ConfigError, match=r"^rollout\.engine: is openai, but training needs transformers or vllm"):
        check_train_config(config)
