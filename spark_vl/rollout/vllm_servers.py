"""vLLM in servers: `spark-vl serve-rollouts`, or `vllm serve` with the same flags.

Every training process sends its own prompts, spread over the servers, one request for the completions of a prompt.
Weights come from the first process, over a `WeightChannel` to the workers of all servers.
"""

from __future__ import annotations

import base64
import io
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore

from spark_vl.config import VLLMConfig
from spark_vl.families.base import ProcessedImage
from spark_vl.policy.weights import Bucket, described
from spark_vl.records import BadRecordError, RolloutGroup
from spark_vl.rollout.engine import EngineError
from spark_vl.rollout.vllm_requests import Asked, Completion, Generate, OnGroup, Read
from spark_vl.rollout.weight_channel import SENDER, WeightChannel

_AT_ONCE = 64
"""Requests of a process that are under way together; a server queues what it cannot run."""
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}
"""Status codes that another try, or another server, may cure."""


class _TryAgainError(Exception):
    """A request failed in a way that another try, or another server, may cure."""


class Servers:
    """The vLLM servers at `settings.servers`.

    A server that cannot be reached when weights are sent is left out until it can, as long as there is another.

    Args:
        say: takes what a person should know.

    Raises:
        EngineError: one is not up after `settings.start_timeout_s`, is not a rollout server, or they serve different
            models.
    """

    def __init__(self, settings: VLLMConfig, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self.settings, self.accelerator, self.say = settings, accelerator, say
        self.urls = [url.rstrip("/") for url in settings.servers]
        self.alive = list(self.urls)
        self._http = httpx.Client(timeout=settings.timeout_s)
        self._pool = ThreadPoolExecutor(max(_AT_ONCE, len(self.urls)), thread_name_prefix="rollouts")
        self._channel: WeightChannel | None = None
        self._store: TCPStore | None = None
        self._joined: list[tuple[str, str]] = []
        """Server and its process of today, in the order of their ranks in the channel."""
        models = [self._wait_until_up(url) for url in self.urls]
        self.model: Mapping[str, Any] = models[0]
        for url, model in zip(self.urls, models, strict=True):
            if model != self.model:
                raise EngineError(f"{url} serves {model}; {self.urls[0]} serves {self.model}: all have to be the same")

    # ── weights ──

    def load(self, buckets: Iterable[Bucket], version: str) -> None:
        """See `vllm_requests.Backend.load`."""
        failed: Exception | None = None
        main = self.accelerator.is_main_process
        if main:
            try:
                self._join()
                for url in self.alive:
                    # Requests that were given up still run, and a step of theirs without weights would end the server.
                    self._post(url, "/pause?mode=abort")
                self._all("begin_weights")
            except EngineError as error:
                failed = error
        for bucket in buckets:
            if main and not failed:
                try:
                    received = self._start_all("receive_weights", described(bucket))
                    assert self._channel is not None
                    self._channel.send(bucket)
                    for future in received:
                        future.result()
                except (EngineError, RuntimeError) as error:  # torch raises the latter when a peer is gone
                    failed = error
        if main and not failed:
            try:
                self._all("finish_weights")
                for url in self.alive:
                    # What was computed from the old weights: prompts, and images.
                    self._post(url, "/reset_prefix_cache")
                    self._post(url, "/reset_encoder_cache")
                    self._post(url, "/update_weight_version", {"new_version": version})
                    self._post(url, "/resume")
            except EngineError as error:
                failed = error
        [failed, self.alive] = broadcast_object_list([failed and str(failed), self.alive])
        if failed:
            self._joined = []  # the channel is made anew
            raise EngineError(f"the rollout servers do not take the weights: {failed}")

    def _join(self) -> None:
        """Connect the channel with the workers of all servers that are up, unless it is."""
        up: list[tuple[str, str]] = []
        sizes: list[int] = []
        for url in self.urls:
            try:
                workers = self._rpc(url, "worker_id")
            except EngineError as error:
                self.say(f"warning: rollout server {url} is left out: {error}")
            else:
                up.append((url, workers[0]["id"]))
                sizes.append(len(workers))
        if not up:
            raise EngineError(f"no rollout server can be reached: {', '.join(self.urls)}")
        self.alive = [url for url, _ in up]
        if up == self._joined:
            return
        host, timeout_s = self._own_address(), self.settings.timeout_s
        if self._store is None:
            self._store = TCPStore(
                "0.0.0.0",
                self.settings.sync_port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
            )
        name, size, first, calls = uuid.uuid4().hex, 1 + sum(sizes), 1, []
        for url, workers_here in zip(self.alive, sizes, strict=True):
            arguments = (host, self._store.port, name, first, size, timeout_s)
            calls.append(self._pool.submit(self._rpc, url, "connect_weights", *arguments))
            first += workers_here
        try:
            self._channel = WeightChannel(
                self._store,
                name=name,
                rank=SENDER,
                size=size,
                device=self.accelerator.device,
                timeout_s=timeout_s,
            )
        except RuntimeError as error:
            raise EngineError(f"the servers' workers do not connect to {host}:{self._store.port}: {error}") from error
        for call in calls:
            call.result()
        self._joined = up

    def _own_address(self) -> str:
        """This machine's address, as the first server sees it."""
        address = urlsplit(self.alive[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
            probe.connect((address.hostname, address.port or 80))
            return probe.getsockname()[0]

    # ── completions ──

    def generate(self, asked: Sequence[Asked], read: Read, on_group: OnGroup) -> dict[int, BadRecordError]:
        """See `vllm_requests.Backend.generate`."""
        return self._generate_at(self.alive, asked, read, on_group)

    def each(self) -> Sequence[tuple[str, Generate]]:
        """See `vllm_requests.Backend.each`: the first process checks all servers."""
        alive = self.alive if self.accelerator.is_main_process else []
        return [(url, partial(self._generate_at, [url])) for url in alive]

    def _generate_at(
        self, urls: Sequence[str], asked: Sequence[Asked], read: Read, on_group: OnGroup
    ) -> dict[int, BadRecordError]:
        """As `generate`, by these servers."""
        first = self.accelerator.process_index  # processes begin with different servers
        running: dict[Future[RolloutGroup], int] = {}
        for i, one in enumerate(asked):
            tries = [urls[(first + i + k) % len(urls)] for k in range(self.settings.retries + 1)]
            running[self._pool.submit(self._group, tries, one, partial(read, i))] = i
        refused: dict[int, BadRecordError] = {}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    try:
                        on_group(i, future.result())
                    except BadRecordError as error:
                        refused[i] = error
        finally:
            for future in running:
                future.cancel()
        return refused

    def _group(
        self, tries: Sequence[str], asked: Asked, read: Callable[[Sequence[int], list[Completion]], RolloutGroup]
    ) -> RolloutGroup:
        """Ask one server after the other."""
        prompt, tokens, settings = asked
        body = {
            "token_ids": tokens,
            "sampling_params": settings,
            "return_token_ids": True,
            "content_parts": [{"type": "image_url", "url": _data_url(image)} for image in prompt.images] or None,
        }
        for k, url in enumerate(tries):
            try:
                answer = self._send(url, "/inference/v1/generate", body)
                return read(answer["prompt_token_ids"], [_completion(choice) for choice in answer["choices"]])
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 400:
                    raise EngineError(f"{prompt.record.id}: {url}: {_reason(error)}") from error
                raise BadRecordError(prompt.record.id, f"{url} refuses the prompt: {_reason(error)}") from error
            except (_TryAgainError, EngineError) as error:
                if k + 1 == len(tries):
                    raise EngineError(f"{prompt.record.id}: {url}: {error}, {len(tries)} tries") from error
                time.sleep(min(2.0**k, 30.0))
        raise AssertionError("there is always one try")

    def close(self) -> None:
        """See `vllm_requests.Backend.close`. The servers go on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    # ── HTTP ──

    def _wait_until_up(self, url: str) -> Mapping[str, Any]:
        begun, said = time.monotonic(), 0.0
        while True:
            try:
                self._http.get(f"{url}/health", timeout=10).raise_for_status()
                return self._rpc(url, "describe_model")[0]
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                waited = time.monotonic() - begun
                if waited > self.settings.start_timeout_s or isinstance(
                    error, httpx.UnsupportedProtocol | httpx.InvalidURL
                ):
                    raise EngineError(
                        f"rollout server {url} (rollout.vllm.servers) is not up after {waited:.0f} s: {error}; start "
                        "it with spark-vl serve-rollouts --config, and this run's configuration"
                    ) from error
                if waited >= said:
                    self.say(f"waiting for rollout server {url}")
                    said += 60
                time.sleep(1)

    def _start_all(self, method: str, *args: Any) -> list[Future[Any]]:
        return [self._pool.submit(self._rpc, url, method, *args) for url in self.alive]

    def _all(self, method: str, *args: Any) -> None:
        for future in self._start_all(method, *args):
            future.result()

    def _rpc(self, url: str, method: str, *args: Any) -> list[Any]:
        """What the workers of a server return. Raises EngineError."""
        answer = self._post(url, "/collective_rpc", {"method": method, "args": args})
        return answer["results"]

    def _post(self, url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return self._send(url, path, body)
        except _TryAgainError as error:
            raise EngineError(f"{url}{path}: {error}") from error
        except httpx.HTTPStatusError as error:
            hint = ""
            if error.response.status_code == 404:
                hint = "; it is not a rollout server: start it with spark-vl serve-rollouts"
            raise EngineError(f"{url}{path}: {_reason(error)}{hint}") from error

    def _send(self, url: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """The answer. Raises `_TryAgainError` where another try may help, else httpx.HTTPStatusError."""
        try:
            response = self._http.post(url + path, json=body)
            response.raise_for_status()
            return response.json() if response.content else None
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _TRY_AGAIN:
                raise _TryAgainError(_reason(error)) from error
            raise
        except (httpx.TransportError, ValueError) as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error


def _reason(error: httpx.HTTPStatusError) -> str:
    """What the server says about it."""
    return f"status {error.response.status_code}: {error.response.text:.300}"


def _data_url(image: ProcessedImage) -> str:
    file = io.BytesIO()
    image.resized.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _completion(choice: Mapping[str, Any]) -> Completion:
    content = (choice["logprobs"] or {}).get("content") or []
    return Completion(
        token_ids=choice["token_ids"] or [],
        logprobs=[at["logprob"] for at in content],
        finish_reason=choice["finish_reason"],
        versions=frozenset(span["version"] for span in choice["weight_versions"] or ()),
    )
