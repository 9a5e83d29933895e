"""The Space: complete as it is staged, and driven over HTTP as a visitor's browser would."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path

import gradio
import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from spark_vl.config import ModelConfig
from spark_vl.demo import digits
from spark_vl.families.qwen_vl import VISION_TOKENS
from spark_vl.families.registry import find_family
from spark_vl.hub.space import MODULES, stage_space
from spark_vl.policy.policy import Policy
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import ImageRef, PromptRecord, plain_text
from spark_vl.rollout import Sampling
from spark_vl.rollout.transformers_engine import TransformersEngine
from spark_vl.space import app
from tests.browser.serving import MODEL, REVISION, served_space, write_model
from tests.conftest import make_image, make_record

ROOT = Path(__file__).parents[1]
ROWS = digits.rows("test")
WRONG, RIGHT = ROWS[0], ROWS[3]
"""Problems whose answers the tiny model, asked for A or B, judges wrong and right."""


def image_of(row: dict) -> ImageRef:
    return ImageRef(data=row["image"]["bytes"])


@pytest.fixture(scope="module", autouse=True)
def space(tmp_path_factory) -> Iterator[Callable[[], str]]:
    """The Space, which starts while the tests before those that need it run."""
    with served_space(tmp_path_factory.mktemp("served")) as address:
        yield address


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny model, with prompts that ask for Yes or No or not."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, yes_no=yes_no) for name, yes_no in (("yes_no", True), ("a_b", False))}


@pytest.fixture(scope="module")
def assistants(models) -> dict[str, app.Assistant]:
    return {name: app.Assistant.load(str(folder)) for name, folder in models.items()}


# ── what is staged ──


def test_a_space_has_every_file_that_the_hub_needs(tmp_path):
    folder = stage_space(tmp_path / "new", model="org/tiny", revision="v1", title="My model: a demo")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {"app.py", "README.md", "requirements.txt", "space.json"} | {f"spark_vl/{m}" for m in MODULES}
    assert json.loads((folder / "space.json").read_text()) == {"model": "org/tiny", "revision": "v1"}
    for name in MODULES:
        assert (folder / "spark_vl" / name).read_bytes() == (ROOT / "spark_vl" / name).read_bytes()

    card = SpaceCard.load(folder / "README.md")
    assert (card.data.title, card.data.models) == ("My model: a demo", ["org/tiny"])
    assert (card.data.sdk, card.data.app_file, card.data.license) == ("gradio", "app.py", "apache-2.0")
    assert tuple(map(int, card.data.python_version.split("."))) >= (3, 11)
    assert "python app.py" in card.text
    untitled = stage_space(tmp_path / "untitled", model="org/tiny")
    assert SpaceCard.load(untitled / "README.md").data.title == "tiny"
    assert json.loads((untitled / "space.json").read_text()) == {"model": "org/tiny", "revision": None}


def test_the_versions_are_those_that_the_kit_is_tested_with():
    requirements = (ROOT / "scripts/space/requirements.txt").read_text().splitlines()
    pinned = SpaceCard.load(ROOT / "scripts/space/README.md").data.sdk_version
    assert gradio.__version__ == pinned
    assert f"gradio=={pinned}" in requirements
    assert f"gradio=={pinned}" in (ROOT / "constraints.txt").read_text().splitlines()
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    others = [line for line in requirements if not line.startswith(("#", "gradio"))]
    assert set(others) <= set(setup["options"]["install_requires"].split("\n"))


def test_nothing_is_written_over_and_no_folder_is_named_as_the_model(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        stage_space(tmp_path, model="org/tiny")
    for model in ("tiny", "runs/7b/model", "../model", ""):
        with pytest.raises(ValueError, match=r"tiny|[Rr]epo|model"):
            stage_space(tmp_path / "new", model=model)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# ── the assistant ──


@pytest.mark.parametrize("prompts", ["yes_no", "a_b"])
def test_it_says_what_the_kit_itself_generates(prompts, models, assistants, monkeypatch):
    """The kit's own processor and engine, given the same prompts, find the same words."""
    config = ModelConfig(path=str(models[prompts]))
    processor = find_family(config).load_processor(config, max_prompt_tokens=512)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(models[prompts])
    policy = Policy(model, attention="sdpa", temperature=1.0, suppressed_token_ids=processor.suppressed_token_ids)
    engine = TransformersEngine(policy, processor, decode_batch_size=1)
    assistant = assistants[prompts]

    def generated(messages: tuple) -> str:
        record = make_record("r/0", "")
        prompt = processor.process(PromptRecord(**{**vars(record), "messages": messages}))
        [group] = engine.generate([prompt], 1, Sampling(0.0, 1.0, 64, seed=0))
        return group.rollouts[0].text

    asked: list[tuple] = []
    reply = assistant._reply
    monkeypatch.setattr(assistant, "_reply", lambda messages: asked.append(messages) or reply(messages))
    verdicts = set()
    for row in (ROWS[i] for i in range(6)):
        question, image = row["question"], image_of(row)
        answer = assistant.answer(question, image)
        judgment = assistant.judge(question, image, answer)
        reflection = assistant.reflect(question, image, answer)
        assert [generated(messages) for messages in asked[-3:]] == [answer, judgment.reply, reflection]
        verdicts.add(judgment.verdict)
    assert verdicts == ({"Wrong"} if prompts == "yes_no" else {"Right", "Wrong"})


@pytest.mark.parametrize(
    ("prompts", "reply", "verdict"),
    [
        ("yes_no", r"It is. \boxed{Yes}", "Right"),
        ("yes_no", r"\boxed{Yes}, or rather \boxed{No}", "Wrong"),
        ("yes_no", r"Yes", "No verdict"),
        ("yes_no", r"\boxed{A}", "No verdict"),
        ("a_b", r"\boxed{A}", "Right"),
        ("a_b", r"\boxed{B}", "Wrong"),
        ("a_b", r"\boxed{Yes}", "No verdict"),
    ],
)
def test_a_verdict_is_read_as_its_prompt_asks_for_it(prompts, reply, verdict, assistants, monkeypatch):
    shown = []
    monkeypatch.setattr(assistants[prompts], "_reply", lambda messages: shown.append(messages) or reply)
    judgment = assistants[prompts].judge("Which digit?", make_image(0), r"long \boxed{7}")
    assert judgment == app.Judgment(verdict, reply)
    [[message]] = shown
    text = plain_text(message.content)
    assert '"7"' in text
    assert "long" not in text
    if prompts == "a_b":
        assert "A: right B: wrong" in text


def test_a_reply_without_an_answer_is_quoted_whole(assistants, monkeypatch):
    shown = []
    monkeypatch.setattr(assistants["yes_no"], "_reply", lambda messages: shown.append(messages) or "")
    assistants["yes_no"].judge("Q", make_image(0), "I do not know")
    assistants["yes_no"].reflect("Q", make_image(0), "I do not know")
    quoting = [plain_text(message.content) for [message] in shown]
    assert len(quoting) == 2
    assert all('"I do not know"' in text for text in quoting)


def test_no_reply_holds_a_vision_token(assistants, monkeypatch):
    assert app.VISION_TOKENS == VISION_TOKENS
    assistant = assistants["yes_no"]
    vocabulary = assistant.processor.tokenizer.get_vocab()
    loved = [vocabulary[token] for token in VISION_TOKENS]
    replies = []
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(assistant.processor, "decode", lambda ids, **_: replies.append(ids.tolist()) or "")

    def love(_module, _inputs, logits: torch.Tensor) -> torch.Tensor:
        logits[..., loved] += 1e4
        return logits

    with assistant.model.lm_head.register_forward_hook(love):
        assistant.answer("Which digit is larger?", image_of(WRONG))
    assert replies[0]
    assert not set(replies[0]) & set(loved)


def test_a_large_image_is_reduced_to_what_runs_train_with(assistants, monkeypatch):
    seen = []
    assistant = assistants["yes_no"]
    processor = assistant.processor
    size = type(processor.image_processor.size)(shortest_edge=28 * 28, longest_edge=10**8)
    monkeypatch.setattr(processor.image_processor, "size", size)
    monkeypatch.setattr(assistant.model, "generate", lambda **inputs: seen.append(inputs) or inputs["input_ids"])
    app.Assistant(assistant.model, processor, assistant.templater).answer("?", make_image(0, (2000, 1500)))
    patches = int(seen[0]["image_grid_thw"].prod())
    assert 0.9 * ModelConfig.max_pixels < patches * 14**2 <= ModelConfig.max_pixels


# ── how it is started ──


def test_a_model_that_cannot_be_loaded_is_named(models, monkeypatch, tmp_path):
    def started(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        return str(stopped.value)

    bare = tmp_path / "bare"
    bare.mkdir()
    assert PROMPTS_FILE in started("--model", str(bare))
    (bare / PROMPTS_FILE).write_text("{}")
    assert re.search(rf"{bare}.*{PROMPTS_FILE}: found", started("--model", str(bare)))
    (bare / PROMPTS_FILE).write_bytes((models["a_b"] / PROMPTS_FILE).read_bytes())
    assert str(bare) in started("--model", str(bare))
    assert "nobody/nothing" in started("--model", "nobody/nothing")


def test_without_options_and_space_json_it_says_what_is_missing(monkeypatch, capsys):
    for arguments, message in ((), "--model is needed"), (("--revision", "v1"), "--revision goes with --model"):
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            app.main()
        assert message in capsys.readouterr().err


# ── served ──


@pytest.fixture(scope="module")
def url(space) -> str:
    """Where the Space is served."""
    return space()


@pytest.fixture
def client(url) -> Client:
    """A new visitor."""
    return Client(url, verbose=False)


@pytest.fixture
def upload(tmp_path) -> Callable[..., dict]:
    """Bytes → the upload of a file that holds them."""

    def make(data: bytes, name: str = "image.png") -> dict:
        (tmp_path / name).write_bytes(data)
        return handle_file(str(tmp_path / name))

    return make


def ask(client: Client, question: str, image: dict | None) -> tuple:
    return client.predict(question, image, api_name="/ask")


def test_an_answer_that_is_judged_wrong_is_reflected_on(client, upload, assistants):
    job = client.submit(WRONG["question"], upload(WRONG["image"]["bytes"]), api_name="/ask")
    last = job.result()
    filled = [sum(map(bool, panels)) for panels in job.outputs()]
    assert filled == sorted(set(filled)), "the panels fill one after another"
    assert [panels[0] for panels in job.outputs()] == ["Answering…", "Judging its answer…", "Reflecting…", "Done."]
    status, final, answer, verdict, judgment, note, revised, reflection = last
    assert (status, verdict, note) == ("Done.", "Wrong", "")
    assert f"\\boxed{{{final}}}" in answer
    assert f"\\boxed{{{revised}}}" in reflection
    # The folder and the cache of the Hub hold the same model.
    there, question, image = assistants["a_b"], WRONG["question"], image_of(WRONG)
    assert answer == there.answer(question, image)
    assert judgment == there.judge(question, image, answer).reply
    assert reflection == there.reflect(question, image, answer)


def test_an_answer_that_is_judged_right_is_reflected_on_only_when_wanted(client, upload):
    first = ask(client, RIGHT["question"], upload(RIGHT["image"]["bytes"]))
    assert first[3] == "Right"
    assert first[5:] == ("Not needed: the model judged its answer right.", "", "")
    then = client.predict(api_name="/reflect")
    assert then[:5] == first[:5]
    assert then[5] == ""
    assert all(then[6:])


def test_what_cannot_be_asked_is_said_in_plain_words(client, upload):
    image = upload(WRONG["image"]["bytes"])
    for question, file, message in (
        ("Which digit?", None, "Please upload an image first"),
        ("", image, "Please type a question"),
        (" \n", image, "Please type a question"),
        ("x" * (app.MAX_QUESTION + 1), image, f"{app.MAX_QUESTION} are allowed"),
    ):
        with pytest.raises(AppError, match=message):
            ask(client, question, file)
    with pytest.raises(AppError, match="no answer to reflect on yet"):
        client.predict(api_name="/reflect")


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


HOSTILE = {
    "a text": ("text.png", b"I am no image.", "not an image in one of the formats PNG"),
    "an SVG": (
        "drawing.svg",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>',
        "not an image in one of the formats PNG",
    ),
    "a truncated PNG": ("cut.png", png((300, 300))[:200], "broken image"),
    "a needle": ("needle.png", png((1, 10_000)), "1×10000 are in a ratio of more than 200"),
    "nothing": ("empty.png", b"", "has 0 bytes"),
}


@pytest.mark.parametrize(("name", "data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_an_image_that_cannot_be_used_is_refused_with_its_reason(name, data, message, client, upload):
    with pytest.raises(AppError, match=f"This image cannot be used: .*{message}"):
        ask(client, "What is this?", upload(data, name))
    assert ask(client, WRONG["question"], upload(WRONG["image"]["bytes"]))[0] == "Done."


def test_a_path_on_the_server_is_not_read(url, tmp_path):
    """The client uploads what it is given; here is one that only names a file."""
    (tmp_path / "secret.png").write_bytes(WRONG["image"]["bytes"])
    file = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{url}gradio_api/call/ask", json={"data": [WRONG["question"], file]}).raise_for_status()
    events = httpx.get(f"{url}gradio_api/call/ask/{call.json()['event_id']}").text
    assert "event: error" in events
    assert "boxed" not in events


def test_an_address_is_not_fetched(url, hub):
    file = {"path": f"{hub.url}/secret.png", "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{url}gradio_api/call/ask", json={"data": [WRONG["question"], file]}).raise_for_status()
    assert "event: error" in httpx.get(f"{url}gradio_api/call/ask/{call.json()['event_id']}").text
    assert not hub.requests


def test_what_is_sent_is_bounded(url, client, upload):
    file = {"files": ("x.png", b"x" * (app.MAX_BYTES + 2**17))}
    assert httpx.post(f"{url}gradio_api/upload", files=file, timeout=60).status_code == 413
    chunks = (b"x" * 2**16 for _ in range(100))
    assert httpx.post(f"{url}gradio_api/call/ask", content=chunks, timeout=60).status_code >= 400
    assert ask(client, WRONG["question"], upload(WRONG["image"]["bytes"]))[0] == "Done."


def test_the_page_says_who_can_reach_it(url):
    assert "Everybody who can open this page can ask" in httpx.get(url).text


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"])
def test_a_question_that_spells_a_special_token_is_a_question(token, client, upload):
    panels = ask(client, f"Which digit {token} is larger?", upload(WRONG["image"]["bytes"]))
    assert panels[0] == "Done."
    assert all(panels[1:5])


def test_the_page_asks_nothing_of_others(url):
    for path in ("", "theme.css"):
        text = httpx.get(url + path).raise_for_status().text
        fetched = re.findall(r"""(?:src=|@import\s|url\(|rel="stylesheet"\s+href=)["'(]*(https?:)?//""", text)
        assert not fetched, path
    config = httpx.get(f"{url}config").json()
    assert config["analytics_enabled"] is False
    assert not [sheet for sheet in config["stylesheets"] if "//" in sheet]


def test_the_model_is_the_one_that_space_json_names(url):
    assert MODEL in httpx.get(url).text
    assert len(REVISION) == 40
