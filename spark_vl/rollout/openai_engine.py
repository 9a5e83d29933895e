"""A server that speaks OpenAI's chat completions as a `Sampler`: one request for each completion.

Texts and images go out, and texts come back. The chat template, the tokens, the limits and how finely images are seen
are the server's, and nothing here checks them.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from itertools import product
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import httpx
import torch
from anyio.from_thread import start_blocking_portal
from PIL import Image

from spark_vl.config import OpenAIConfig, read_token
from spark_vl.data.images import FORMATS, ImageError, encode_pixels, image_path, load_image
from spark_vl.families.base import ProcessedPrompt
from spark_vl.families.chat import behind_thought
from spark_vl.records import (
    BadRecordError,
    Content,
    ImageRef,
    ImageSize,
    Message,
    PromptRecord,
    Rollout,
    RolloutGroup,
    writable,
)
from spark_vl.rollout.engine import EngineError, PromptsRefusedError, Sampling, nothing

T = TypeVar("T")
Found = tuple[int, int, Rollout | BadRecordError] | None
"""Index of a prompt, index of a completion, and what came of it; None: nothing more comes."""

FIRST_WAIT_S = 1.0
"""Before the first new try; it doubles up to `_MAX_WAIT_S`, and up to half of it is left out by chance."""
_MAX_WAIT_S = 30.0
_MAX_ASKED_WAIT_S = 300.0
"""Who asks for a longer wait has run out of something, such as money."""
_CONNECT_S = 30.0
_SHOWN = 300
"""Characters of an answer in a message."""
_TRY_AGAIN = {408, 409, 425, 429}
"""Status codes that a new try may cure, as from 500 on."""
_ABOUT_THE_PROMPT = {400, 413, 422}
_EXTENDED = {"vllm", "sglang"}
"""Servers (`owned_by` in their list of models) that take a checkpoint's generation_config.json for what a request does
not say, and know the fields that say it."""
_THOUGHT = ("<think>", "</think>")
"""What marks a chain of thought where the server does not part it from the answer."""


class OpenAIEngine:
    """`Sampler` by the server at `settings.base_url`.

    A request asks for one completion, since many servers know no `n`, with a seed of its own where it is drawn. Vision
    tokens are not suppressed. vLLM and SGLang are told `top_k`, `min_p` and `repetition_penalty`, too, which they would
    else take from the checkpoint; others get a `repetition_penalty` where it is not 1.

    Rollouts have neither tokens nor log-probabilities: `Rollout.counted` is what the server counts. What it withholds
    (`finish_reason` content_filter) is the empty text, or the refusal in words; what it makes a tool call of is the
    text beside it. A chain of thought that it parts from the answer (`reasoning_content`, or `reasoning`) stands before
    it in the text, and `Rollout.answer_start` behind it, as behind `</think>` where it is not parted.

    Args:
        model: its name at the server, unless `settings` have one.

    Raises:
        ConfigError: there is no key where `settings.token_from` says.
    """

    def __init__(self, settings: OpenAIConfig, model: str) -> None:
        self.settings, self.model = settings, settings.model or model
        self.url = str(settings.base_url).rstrip("/")
        self.key = read_token(settings.token_from, "rollout.openai.token_from") if settings.token_from else None
        self.extended: bool | None = None
        """Whether it is one of `_EXTENDED`; None: it has not been asked."""

    def generate(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        progress: Callable[[int], None] = nothing,
        on_group: Callable[[int, RolloutGroup], None] = nothing,
    ) -> list[RolloutGroup]:
        """See `Sampler.generate`. `progress` and `on_group` are called in the calling thread.

        A prompt is refused where the server says so (400, 413, 422) and takes a plain one. EngineError: it refuses that
        too, or the key, or the model; or a request has failed `settings.retries` + 1 times in ways that another try
        might have cured. A rate limit is no failure while other requests get through.
        """
        found: SimpleQueue[Found] = SimpleQueue()
        rollouts: list[dict[int, Rollout]] = [{} for _ in prompts]
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        refused: dict[int, BadRecordError] = {}
        # In a loop of its own, whatever runs in this thread. Leaving the block by an error or Ctrl-C ends all requests.
        with start_blocking_portal() as portal:
            asking = portal.start_task_soon(_Call(self, prompts, n, sampling, found.put).run)
            asking.add_done_callback(lambda _: found.put(None))
            while item := found.get():
                i, k, completion = item
                if isinstance(completion, BadRecordError):
                    refused.setdefault(i, completion)
                    continue
                progress(1)
                rollouts[i][k] = completion
                if len(rollouts[i]) == n:
                    groups[i] = group = RolloutGroup(prompts[i].record, tuple(rollouts[i][k] for k in range(n)))
                    on_group(i, group)
            asking.result()
        if refused:
            raise PromptsRefusedError(groups, refused)
        return [group for group in groups if group]

    def close(self) -> None:
        """See `Sampler.close`. Connections end with each call."""


class RemotePrompts:
    """`Prompts` for a server: nothing is tokenized or resized, and no pixels are kept.

    Records get the sizes of their images, without resizing, and no `coordinates`: how the server's model writes them is
    not known here.
    """

    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """See `Prompts.process`."""
        sizes = []
        for ref in record.images:
            try:
                size = load_image(ref).size
            except ImageError as error:
                raise BadRecordError(record.id, f"image {ref}: {error}") from error
            sizes.append(ImageSize(size, size))
        for message in record.messages:
            for part in message.content:
                if isinstance(part, str) and writable(part) != part:
                    raise BadRecordError(record.id, "the prompt is not valid Unicode")
        nothing_here = torch.empty(0, dtype=torch.long)
        return ProcessedPrompt(
            record=replace(record, image_sizes=tuple(sizes)),
            input_ids=nothing_here,
            position_ids=nothing_here,
            images=(),
        )

    def forget_images(self) -> None:
        """See `Prompts.forget_images`; there are none."""


class _TryAgainError(Exception):
    """A request failed in a way that another try may cure.

    Args:
        limited: the server is asked too often.
        wait_s: seconds that it wants to be left alone.
    """

    def __init__(self, reason: str, *, limited: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.limited, self.wait_s = limited, wait_s


class _RefusedError(Exception):
    """The server does not do it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class _Call:
    """The requests of one call of `generate`, in an event loop.

    Args:
        report: takes what is found, as soon as it is.
    """

    def __init__(
        self,
        engine: OpenAIEngine,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        report: Callable[[Found], None],
    ) -> None:
        self.engine, self.prompts, self.n, self.sampling, self.report = engine, prompts, n, sampling, report
        self.answered = 0
        """Completions so far."""
        self.taken: set[bool] = set()
        """Whether a prompt that was taken has images."""
        self.refused: set[int] = set()
        self.probing = asyncio.Lock()

    async def run(self) -> None:
        """All requests, so many together."""
        settings = self.engine.settings
        many = settings.concurrency
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.engine.key}"} if self.engine.key else {},
            timeout=httpx.Timeout(settings.timeout_s, connect=min(settings.timeout_s, _CONNECT_S), pool=None),
            limits=httpx.Limits(max_connections=many, max_keepalive_connections=many),
        ) as self.client:
            if self.engine.extended is None:
                self.engine.extended = await self._is_extended()
            jobs = iter(product(range(len(self.prompts)), range(self.n)))
            workers = [asyncio.create_task(self._work(jobs)) for _ in range(many)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    async def _work(self, jobs: Iterator[tuple[int, int]]) -> None:
        for i, k in jobs:
            if i in self.refused:
                continue
            try:
                self.report((i, k, await self._completion(i, k)))
            except BadRecordError as error:
                self.refused.add(i)
                self.report((i, k, error))

    async def _completion(self, i: int, k: int) -> Rollout:
        """Completion `k` of prompt `i`. Raises a BadRecordError if the server refuses this prompt, not any."""
        record = self.prompts[i].record
        seed = zlib.crc32(f"{self.sampling.seed}/{i}/{k}".encode()) >> 1  # some take 31 bits
        body = await asyncio.to_thread(self._body, record.messages, record.id, seed)
        try:
            rollout = await self._post(body)
        except _RefusedError as error:
            await self._check_taken(bool(record.images))
            raise BadRecordError(record.id, f"{self.engine.url} refuses the prompt: {error}") from error
        self.answered += 1
        self.taken.add(bool(record.images))
        return rollout

    async def _check_taken(self, images: bool) -> None:
        """Raises an EngineError unless the server takes some prompt, with images or without: it is then asked for
        something that it does not do."""
        async with self.probing:
            if images in self.taken:
                return
            content = (ImageRef(data=encode_pixels(Image.new("RGB", (64, 64), "white"))),) if images else ()
            try:
                await self._post(self._body((Message("user", (*content, "Say yes.")),), "probe", 0))
            except _RefusedError as error:
                asked = ", ".join(self._fields(0))
                raise EngineError(
                    f"{self.engine.url} refuses any prompt{' with an image' if images else ''}: {error}; it is asked "
                    f"for {asked}"
                    + ("" if self.sampling.repetition_penalty == 1 else ": does it know a repetition_penalty?")
                ) from error
            self.taken.add(images)

    async def _is_extended(self) -> bool:
        """Whether the server is one of `_EXTENDED`; one that does not list its models is not."""
        try:
            return bool(_EXTENDED & await self._try("GET", "/models", _owners))
        except _RefusedError:
            return False

    # ── requests ──

    def _fields(self, seed: int) -> dict[str, Any]:
        sampling = self.sampling
        fields: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        }
        if sampling.temperature:
            fields["seed"] = seed
        if self.engine.extended:
            fields |= {"top_k": -1, "min_p": 0.0}
        if self.engine.extended or sampling.repetition_penalty != 1:
            fields["repetition_penalty"] = sampling.repetition_penalty
        return fields

    def _body(self, messages: Sequence[Message], name: str, seed: int) -> bytes:
        """Raises a BadRecordError about the record of that `name` if an image cannot be read."""
        try:
            said = [{"role": message.role, "content": content_of(message.content)} for message in messages]
        except ImageError as error:
            raise BadRecordError(name, f"an image: {error}") from error
        return json.dumps({"model": self.engine.model, "messages": said, **self._fields(seed)}).encode()

    async def _post(self, body: bytes) -> Rollout:
        """A completion. Raises `_RefusedError` if the server may take another prompt, else EngineError."""
        try:
            return await self._try("POST", "/chat/completions", read_completion, body)
        except _RefusedError as error:
            if error.status in _ABOUT_THE_PROMPT:
                raise
            raise EngineError(f"{self.engine.url}: {error}{self._advice(error.status)}") from error

    def _advice(self, status: int) -> str:
        settings = self.engine.settings
        if status in (401, 403):
            key = f"the key in {settings.token_from}" if settings.token_from else "no key was sent"
            return f"; {key} (rollout.openai.token_from): does it allow the model {self.engine.model!r}?"
        if status == 404:
            return (
                f"; is there the model {self.engine.model!r} (rollout.openai.model), and does rollout.openai.base_url "
                "end where /chat/completions begins, mostly with /v1?"
            )
        return ""

    async def _try(self, method: str, path: str, read: Callable[[Any], T], body: bytes | None = None) -> T:
        """What `read` makes of the answer, once one can be read."""
        failed = 0
        while True:
            answered = self.answered
            try:
                return read(await self._send(method, path, body))
            except _TryAgainError as error:
                failed = 0 if error.limited and self.answered > answered else failed + 1
                reason = f"{self.engine.url}{path}: {self._shown(str(error))}"
                if failed > self.engine.settings.retries:
                    raise EngineError(f"{reason}; {failed} tries (rollout.openai.retries)") from None
                if error.wait_s > _MAX_ASKED_WAIT_S:
                    most = f"at most {_MAX_ASKED_WAIT_S:.0f} are waited"
                    raise EngineError(f"{reason}; it asks to wait {error.wait_s:.0f} s, and {most}") from None
                own = min(FIRST_WAIT_S * 2 ** max(failed - 1, 0), _MAX_WAIT_S)
                await asyncio.sleep(error.wait_s + own * random.uniform(0.5, 1.0))

    async def _send(self, method: str, path: str, body: bytes | None) -> Any:
        """The answer's JSON."""
        try:
            response = await self.client.request(
                method, self.engine.url + path, content=body, headers={"Content-Type": "application/json"}
            )
        except httpx.RequestError as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        status = response.status_code
        # A list of models that fails with 500 is not there (transformers 5.19 where nothing is in the Hub's cache).
        if status in _TRY_AGAIN or status > 500 or (status == 500 and body):
            wait_s = _seconds(response.headers.get("Retry-After", ""))
            raise _TryAgainError(f"status {status}: {response.text}", limited=status == 429, wait_s=wait_s)
        if not response.is_success:
            raise _RefusedError(status, self._shown(response.text))
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise _TryAgainError(f"the answer is not JSON: {response.text!r}") from error

    def _shown(self, text: str) -> str:
        """What the server wrote, for messages, which go to logs: some servers repeat the key."""
        return (text.replace(self.engine.key, "…") if self.engine.key else text)[:_SHOWN]


def _seconds(retry_after: str) -> float:
    """The seconds that a header Retry-After asks for, from now on; 0: it asks for none, or cannot be read."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after):
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _owners(reply: Any) -> set[str]:
    """Who has the models in a list of them, if it is one."""
    models = reply.get("data") if isinstance(reply, dict) else None
    found = [each.get("owned_by") for each in models if isinstance(each, dict)] if isinstance(models, list) else []
    return {each for each in found if isinstance(each, str)}


def read_completion(reply: Any) -> Rollout:
    """The completion in a reply. See `OpenAIEngine` for what becomes of its parts."""
    try:
        [choice] = reply["choices"]
        message, ended, tokens = choice["message"], choice["finish_reason"], reply["usage"]["completion_tokens"]
        content = message.get("content") or message.get("refusal") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _TryAgainError(
            f"the answer is not a completion ({type(error).__name__}: {error}): {reply!r:.300}"
        ) from error
    if not isinstance(content, str) or not isinstance(thought, str) or type(tokens) is not int or tokens < 0:
        raise _TryAgainError(f"the answer is not a completion of texts with a number of tokens: {reply!r:.300}")
    if ended not in ("stop", "length", "content_filter", "tool_calls", "function_call"):
        raise _TryAgainError(f"the completion ended with {ended!r}; allowed: stop, length, content_filter, tool_calls")
    finish_reason: Literal["stop", "length"] = "length" if ended == "length" else "stop"
    text, start = content, behind_thought(content, _THOUGHT)
    if thought:
        text = f"{thought}\n\n{content}" if content else thought
        start = len(text) - len(content)
    return Rollout((), (), text, finish_reason, answer_start=start, counted=tokens)


def content_of(content: Content) -> str | list[dict[str, Any]]:
    """The content of a message as the API takes it: a text, which any server takes, unless there are images.

    Raises:
        ImageError: an image cannot be read.
    """
    if all(isinstance(part, str) for part in content):
        return "".join(map(str, content))
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in content
    ]


def data_url(ref: ImageRef) -> str:
    """The image's own file, if every reader shows the same pixels of it; else a PNG of those that we read.

    Raises:
        ImageError: see `load_image`.
    """
    try:
        data = ref.data if ref.data is not None else image_path(ref).read_bytes()
    except OSError as error:
        raise ImageError(f"{ref} cannot be read: {error.strerror}") from error
    image = load_image(ImageRef(data=data))
    format = _plain_format(data)
    if format is None:
        format, data = "PNG", encode_pixels(image)
    return f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"


def _plain_format(data: bytes) -> str | None:
    """The format of a file that `load_image` reads; None: readers disagree about its rotation, alpha, colors or depth,
    or do not know it."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format not in ("PNG", "JPEG", "WEBP") or image.mode not in ("1", "L", "P", "RGB"):
            return None
        try:
            upright = image.getexif().get(0x0112, 1) == 1
        except SyntaxError:  # EXIF that cannot be read
            upright = False
        return image.format if upright and not image.has_transparency_data else None
