"""The page of a Space: upload an image, ask, and see the model answer, judge its answer and, if it must, reflect.

    python app.py --model FOLDER_OR_HUB_ID [--revision REVISION]

Without options, `space.json` beside this file names model and revision; `spark_vl.hub.space` writes it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import gradio as gr
import torch
from huggingface_hub import hf_hub_download
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin

from spark_vl.answers import last_boxed
from spark_vl.config import ModelConfig
from spark_vl.data.images import MAX_BYTES, ImageError, load_image
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import ImageRef, Message

MAX_NEW_TOKENS = 1024
"""Tokens of one reply; one that is longer is cut off, and has no final answer then."""

MAX_QUESTION = 4000
"""Characters of a question."""

MAX_STORED_BYTES = 2**30
"""Of all uploads together, those on their way included."""

MAX_STORED_FILES = 10_000

MAX_AGE_S = 3600
"""Seconds after which an upload and the turns of a visit are deleted; they are looked for every tenth of it."""

MAX_UPLOAD_S = 120
"""Seconds in which a request's body must have come."""

MAX_BODY = 2**20
"""Bytes of a request that is no upload."""

_MAX_UPLOAD = MAX_BYTES + 2**16  # the file, and what is around it
_FILES_AT_ONCE = 1000  # in one upload, as Starlette allows

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Never generated: they stand for an image, and a reply has none."""


# ── the model ──


@dataclass(frozen=True)
class Judgment:
    """What the model says of its own answer."""

    verdict: Literal["Right", "Wrong", "No verdict"]
    reply: str
    """All that it said."""


class Assistant:
    """One model that answers, judges its answer and reflects on it, with the prompts that it was trained on.

    As in the test-time reflection of `spark-vl eval`, a judge sees the final answer, or the whole reply where there is
    none, and a reflection is told to check it, not that it is wrong. Replies are greedy.

    Args:
        model: of the Qwen2.5-VL family.
        processor: its own.
        templater: words the prompts.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, templater: Templater) -> None:
        self.model, self.processor, self.templater = model, processor, templater
        vocabulary = processor.tokenizer.get_vocab()
        self._generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            repetition_penalty=1.0,  # Qwen's own file asks for one, with which the model was not trained
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=[vocabulary[token] for token in VISION_TOKENS if token in vocabulary],
        )
        size = processor.image_processor.size
        # A processor's own limit can be far above the one that runs train with: minutes for a photograph.
        self._size = {
            "shortest_edge": size["shortest_edge"],
            "longest_edge": min(size["longest_edge"], ModelConfig.max_pixels),
        }
        judging = [template for template in templater.templates.values() if template.kind == "pointwise"]
        # The first that asks for Yes or No; a set of templates need not have one.
        self._judging = min(judging, key=lambda template: template.options is not None)

    @classmethod
    def load(cls, model: str, revision: str | None = None) -> Assistant:
        """The model in a folder or on the Hub, on the GPU if there is one.

        Raises:
            OSError, ValueError: the model, its processor or its prompts are not there or cannot be used.
        """
        folder = Path(model)
        prompts = folder / PROMPTS_FILE if folder.is_dir() else hf_hub_download(model, PROMPTS_FILE, revision=revision)
        templater = Templater.read(Path(prompts))
        # Left to itself, transformers asks at the terminal whether to run a repository's own code.
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
        weights = AutoModelForImageTextToText.from_pretrained(
            model,
            revision=revision,
            dtype="auto",
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(weights.to(device).eval(), processor, templater)

    def answer(self, question: str, image: ImageRef) -> str:
        """The reply to `question`.

        Raises:
            ImageError: the image cannot be used; so do the other two.
        """
        return self._reply(self.templater.problem((image, question)))

    def judge(self, question: str, image: ImageRef, completion: str) -> Judgment:
        """Whether `completion`, an earlier reply to `question`, is right."""
        rendered = self.templater.pointwise(
            (image, question),
            _quote(completion),
            correct=True,  # makes `gold` the label that says so
            rng=random.Random(0),
            template=self._judging.name,
            correct_first=True,
        )
        reply = self._reply(rendered.messages)
        label = self._judging.parse(reply)
        return Judgment("No verdict" if label is None else "Right" if label == rendered.gold else "Wrong", reply)

    def reflect(self, question: str, image: ImageRef, completion: str) -> str:
        """Another reply to `question`, with `completion` at hand."""
        shows = "answer" if last_boxed(completion) else "cot"
        rendered = self.templater.reflection(
            (image, question), _quote(completion), correct=True, shows=shows, rng=random.Random(0)
        )
        return self._reply(rendered.messages)

    @torch.inference_mode()
    def _reply(self, messages: Sequence[Message]) -> str:
        chat = self.processor.apply_chat_template(
            [_chat_message(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        images = [load_image(part) for message in messages for part in message.content if isinstance(part, ImageRef)]
        inputs = self.processor(text=[chat], images=images, images_kwargs={"size": self._size}, return_tensors="pt")
        output = self.model.generate(**inputs.to(self.model.device), generation_config=self._generation)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _quote(completion: str) -> str:
    return last_boxed(completion) or completion


def _chat_message(message: Message) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content]
    return {"role": message.role, "content": parts}


# ── what is stored ──


class Bounds:
    """Keeps what visitors send within bounds: each request, and the files of all uploads that have not been deleted.

    Args:
        app: what answers.
        folder: of the uploads.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder
        self._running = 0  # uploads
        self._counting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 413 (too large), 408 (too slow) or 507 (no room)."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        upload = scope["path"].rstrip("/").endswith("/upload")
        limit = _MAX_UPLOAD if upload else MAX_BODY
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            return await _refusal(413, f"At most {limit} bytes are allowed.")(scope, receive, send)
        if upload:
            async with self._counting:  # two at once would be given the same room
                if not await asyncio.to_thread(self._has_room):
                    return await _refusal(507, "No room for more uploads; try again later.")(scope, receive, send)
                self._running += 1
        started = False
        left = limit
        until = asyncio.get_running_loop().time() + MAX_UPLOAD_S
        whole = False

        async def bounded_receive() -> Event:
            nonlocal left, whole
            if whole:  # what comes now is that the visitor has gone, whenever that is
                return await receive()
            async with asyncio.timeout_at(until):
                message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLargeError
            whole = not message.get("more_body", False)
            return message

        async def noted_send(message: Event) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, bounded_receive, noted_send)
        except (_TooLargeError, TimeoutError) as error:
            if started:
                raise
            status = 413 if isinstance(error, _TooLargeError) else 408
            await _refusal(status, f"{limit} bytes in {MAX_UPLOAD_S} s are allowed.")(scope, receive, send)
        finally:
            self._running -= upload

    def _has_room(self) -> bool:
        """For one more upload, were it and those on their way as large as they may be."""
        files = [file.stat().st_size for file in self.folder.rglob("*") if file.is_file()]
        coming = self._running + 1
        return (
            sum(files) + coming * _MAX_UPLOAD <= MAX_STORED_BYTES
            and len(files) + coming * _FILES_AT_ONCE <= MAX_STORED_FILES
        )


class _TooLargeError(Exception):
    """A request without a declared length."""


def _refusal(status: int, words: str) -> PlainTextResponse:
    return PlainTextResponse(words, status, headers={"Connection": "close"})


async def _uploaded(path: str) -> str:
    """The file of an upload. Gradio would also fetch an address that a visitor names, and store what it finds."""
    if "://" in path:
        raise gr.Error("Please upload the image itself.", print_exception=False)
    return path


# ── the page ──


@dataclass(frozen=True)
class Turn:
    """One question on its way through the panels; None is what the model has not said yet."""

    question: str
    image: ImageRef
    answer: str | None = None
    judgment: Judgment | None = None
    reflection: str | None = None

    def panels(self, status: str) -> tuple[str, str, str, str, str, str, str, str, Turn]:
        """What the page shows, in the order of its outputs."""
        verdict, judgment = ("", "") if self.judgment is None else (self.judgment.verdict, self.judgment.reply)
        note = NOT_REFLECTED.get(verdict, "") if self.reflection is None else ""
        answer, reflection = self.answer or "", self.reflection or ""
        return status, _final(self.answer), answer, verdict, judgment, note, _final(self.reflection), reflection, self


NOT_REFLECTED = {
    "Right": "Not needed: the model judged its answer right.",
    "No verdict": "Not done: the model gave no verdict on its answer.",
}

VERDICT = '<span>Verdict</span><b class="${value}">${value || "–"}</b>'

CSS = """
.card { gap: var(--spacing-xl); padding: var(--spacing-xl) var(--spacing-xxl) var(--spacing-xxl);
        border: 1px solid var(--border-color-primary); border-radius: var(--radius-xl);
        background: var(--block-background-fill); }
.card .block, .card .form, .card .html-container { padding: 0; border: 0; background: none; box-shadow: none; }
.card .form { gap: var(--spacing-xl); }
.card h2 { margin: 0; font-size: var(--text-lg); }
.card label > span, .verdict span { display: block; margin: 0 0 2px; font-size: var(--text-sm);
                                    color: var(--block-title-text-color); }
.card textarea { padding: 0; border: 0; background: none; box-shadow: none; color: var(--body-text-color); }
.final textarea { font-size: var(--text-xl); font-weight: 600; }
.verdict b { display: inline-block; border-radius: 99px; }
.verdict .Right, .verdict .Wrong, .verdict .No { padding: 2px 14px; color: white; }
.verdict .Right { background: #166534; }
.verdict .Wrong { background: #991b1b; }
.verdict .No { background: #854d0e; }
#status { min-height: 1.5em; text-align: center; }
"""

THEME = gr.themes.Default(
    primary_hue="indigo",
    # Fonts of the reader's own system: others would be fetched from elsewhere.
    font=("Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"),
    font_mono=("Menlo", "Consolas", "monospace"),
)


def build(assistant: Assistant, name: str) -> gr.Blocks:
    """The page on which `assistant` is asked; `name` is what its readers call the model."""

    def ask(question: str | None, file: str | None) -> Iterator[tuple]:
        """Answer a question about an image, judge the answer and, if it is judged wrong, reflect on it."""
        turn = _begin(question, file)
        yield turn.panels("Answering…")
        turn = replace(turn, answer=assistant.answer(turn.question, turn.image))
        yield turn.panels("Judging its answer…")
        turn = replace(turn, judgment=assistant.judge(turn.question, turn.image, turn.answer))
        if turn.judgment.verdict == "Wrong":
            yield from reflect(turn)
        else:
            yield turn.panels("Done.")

    def reflect(turn: Turn | None) -> Iterator[tuple]:
        """Reflect on the last answer, however it was judged."""
        if turn is None or turn.judgment is None:
            raise gr.Error("There is no answer to reflect on yet; ask a question first.", print_exception=False)
        yield turn.panels("Reflecting…")
        reflection = assistant.reflect(turn.question, turn.image, turn.answer)
        yield replace(turn, reflection=reflection).panels("Done.")

    def can_reflect(turn: Turn | None) -> dict:
        done = turn is not None and turn.judgment is not None and turn.judgment.verdict != "Wrong"
        return gr.Button(visible=done and turn.reflection is None)

    shown = {"interactive": False, "placeholder": "–", "max_lines": 40, "autoscroll": False}
    with gr.Blocks(title=f"Ask {name}", analytics_enabled=False, delete_cache=(MAX_AGE_S // 10, MAX_AGE_S)) as page:
        gr.Markdown(
            f"# Answer, judge, reflect\n**{name}** answers a question about an image, judges its own answer and, "
            "where it finds it wrong, reflects and answers again."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=320,
                    alt_text="The uploaded image",
                )
                # Gradio would open the file itself; that is for the kit's loader, which checks more and says why.
                image.preprocess = lambda payload: None if payload is None else payload.path
                image.async_move_resource_to_block_cache = _uploaded
                question = gr.Textbox(label="Question", max_lines=8)
                ask_button = gr.Button("Ask", variant="primary")
                status = gr.HTML(label="Status", elem_id="status", js_on_load="element.setAttribute('role', 'status')")
            with gr.Column(scale=3, min_width=320):
                with gr.Column(elem_classes="card"):
                    gr.Markdown("## 1. Answer")
                    answer = gr.Textbox(label="Final answer", elem_classes="final", **shown)
                    answer_reply = gr.Textbox(label="Whole reply", **shown)
                with gr.Column(elem_classes="card"):
                    gr.Markdown("## 2. Judgment")
                    verdict = gr.HTML(label="Verdict", html_template=VERDICT, elem_classes="verdict")
                    judgment_reply = gr.Textbox(label="Whole reply", **shown)
                with gr.Column(elem_classes="card"):
                    gr.Markdown("## 3. Reflection")
                    note = gr.Markdown(label="Why not")
                    reflection = gr.Textbox(label="Final answer after reflection", elem_classes="final", **shown)
                    reflection_reply = gr.Textbox(label="Whole reply", **shown)
                    reflect_button = gr.Button("Reflect anyway", size="md", visible=False)
        gr.Markdown(
            "Everybody who can open this page can ask. Images and answers are kept on its server for at most "
            f"{(MAX_AGE_S + MAX_AGE_S // 10) // 60} minutes; upload nothing that its owner may not see."
        )
        turn = gr.State(time_to_live=MAX_AGE_S)

        outputs = [status, answer, answer_reply, verdict, judgment_reply, note, reflection, reflection_reply, turn]
        # One model, so one question at a time, from all visitors together.
        alone = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        asked = gr.on([ask_button.click, question.submit], ask, [question, image], outputs, api_name="ask", **alone)
        again = reflect_button.click(reflect, turn, outputs, api_name="reflect", **alone)
        for event in (asked, again):
            event.failure(lambda: "Stopped.", outputs=status, api_visibility="private")
        turn.change(can_reflect, turn, reflect_button, api_visibility="private", show_progress="hidden", queue=False)
    return page


def _begin(question: str | None, file: str | None) -> Turn:
    """The turn that starts with what was typed and the file that was uploaded.

    Raises:
        gr.Error: it cannot be asked, and why.
    """
    if file is None:
        raise gr.Error("Please upload an image first.", print_exception=False)
    if question is None or not question.strip():
        raise gr.Error("Please type a question about the image.", print_exception=False)
    if len(question) > MAX_QUESTION:
        raise gr.Error(
            f"The question is too long: {len(question)} characters, and {MAX_QUESTION} are allowed.",
            print_exception=False,
        )
    image = ImageRef(path=Path(file).name, root=str(Path(file).parent))
    try:
        load_image(image)
    except ImageError as error:
        raise gr.Error(f"This image cannot be used: {error}.", print_exception=False) from error
    return Turn(question.strip(), image)


def _final(reply: str | None) -> str:
    return "" if reply is None else last_boxed(reply) or "None: the reply has no \\boxed{} with an answer in it."


def main() -> None:
    """Serve the page until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a checkpoint, or Hub id; without it, space.json names the model")
    parser.add_argument("--revision", help="commit, tag or branch of the Hub id")
    options = parser.parse_args()
    if options.model is None:
        if options.revision is not None:
            parser.error("--revision goes with --model")
        settings = Path(__file__).with_name("space.json")
        if not settings.is_file():
            parser.error(f"--model is needed: there is no {settings}")
        options = argparse.Namespace(**json.loads(settings.read_text(encoding="utf-8")))
    try:
        assistant = Assistant.load(options.model, options.revision)
    except (OSError, ValueError) as error:
        sys.exit(f"The model {options.model} cannot be loaded: {error}")
    folder = Path(options.model)
    name = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    others = (
        "only from this machine" if name in ("127.0.0.1", "localhost", "::1") else "by all who can reach this machine"
    )
    print(f"Listens on {name}: can be used {others}. There is no password.", flush=True)
    with TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # its own, so that what others store does not count
        page = build(assistant, folder.resolve().name if folder.is_dir() else options.model)
        page.queue(max_size=32).launch(
            theme=THEME,
            css=CSS,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            run_history=False,
            share=False,
            state_session_capacity=1000,
            app_kwargs={"middleware": [Middleware(Bounds, folder=Path(uploads))]},
        )


if __name__ == "__main__":
    main()
