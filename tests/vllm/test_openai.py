"""`rollout.engine: openai` at real servers: vLLM's, and that of transformers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from spark_vl.config import ModelConfig, OpenAIConfig, RolloutConfig
from spark_vl.rollout import EngineError, Loaded, PromptsRefusedError, Sampling, load_sampler
from tests.conftest import make_image, make_record
from tests.distributed.launching import Run
from tests.vllm.conftest import CHECKPOINT, MISLEADING, free_port, wait_up

pytestmark = pytest.mark.vllm

GREEDY = Sampling(0.0, 1.0, 24, 0)
DRAWN = Sampling(1.0, 1.0, 24, 7)
MODEL = ModelConfig(CHECKPOINT, dtype="float32", min_pixels=784, max_pixels=50176, gradient_checkpointing=False)
"""With the limits of the checkpoint's own processor, which a server applies."""

# None is resized, which not all libraries do alike.
SMALL, WIDE, TALL = make_image(1), make_image(2, (196, 84)), make_image(3, (84, 140))
RECORDS = [
    make_record("text", "What is 3 plus 4?"),
    make_record("one", WIDE, "Which digit is this?"),
    make_record("two", SMALL, "and", TALL, "Add the two digits."),
]


def serve(kind: str, folder: Path, port: int) -> Run:
    """A server as anybody starts one, with a checkpoint whose generation_config.json says much."""
    model = folder / "model"
    copytree(CHECKPOINT, model)
    generation = model / "generation_config.json"
    own = MISLEADING if kind == "vllm" else {"do_sample": True}  # without which the other never draws
    generation.write_text(json.dumps(json.loads(generation.read_text()) | own))
    if kind == "vllm":
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name=tiny"]
        command += ["--dtype=float32", "--max-model-len=280", "--enforce-eager", "--no-enable-chunked-prefill"]
    else:
        command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model)]
        command += ["--dtype=float32", "--device=cpu"]
    return Run([*command, "--host=127.0.0.1", f"--port={port}"], 900.0)


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def served(kind, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    with serve(kind, folder, port) as run:
        if kind == "vllm":
            yield ask(wait_up(run, port), "tiny")
        else:  # seeds are the process's, so one request at a time
            yield ask(wait_up(run, port), str(folder / "model"), concurrency=1)


@pytest.fixture(scope="module")
def records(kind):
    """The server of transformers reads images with torchvision, whose decoders this environment lacks."""
    return RECORDS if kind == "vllm" else RECORDS[:1]


def ask(url: str, name: str, **settings) -> Loaded:
    openai = OpenAIConfig(base_url=f"{url}/v1", model=name, **settings)
    return load_sampler(MODEL, RolloutConfig("openai", openai=openai), max_prompt_tokens=256, max_new_tokens=24)


@pytest.fixture(scope="module")
def local():
    return load_sampler(MODEL, RolloutConfig(), max_prompt_tokens=256, max_new_tokens=24)


def answers(model: Loaded, records, n: int, sampling: Sampling) -> list[list[tuple[str, str, int]]]:
    groups = model.sampler.generate([model.prompts.process(record) for record in records], n, sampling)
    return [[(rollout.text, rollout.finish_reason, rollout.tokens) for rollout in group.rollouts] for group in groups]


def test_greedy_texts_and_numbers_of_tokens_are_those_of_the_transformers_engine(served, local, records):
    expected = answers(local, records, 1, GREEDY)
    assert len({str(each) for each in expected}) == len(records)
    assert answers(served, records, 1, GREEDY) == expected


def test_a_repetition_penalty_is_applied(kind, served, local, records):
    penalized = replace(GREEDY, repetition_penalty=1.3)
    if kind == "transformers":  # which does not know it
        with pytest.raises(
            EngineError, match=r"refuses any prompt: .*'repetition_penalty'.*know a repetition_penalty\?"
        ):
            answers(served, records, 1, penalized)
        return
    expected = answers(local, records, 1, penalized)
    assert expected != answers(local, records, 1, GREEDY)
    assert answers(served, records, 1, penalized) == expected


def test_completions_are_drawn_and_a_seed_gives_the_same(served, records):
    """vLLM's checkpoint asks for top_k 1."""
    once = answers(served, records, 4, DRAWN)
    assert all(len({text for text, _, _ in group}) > 1 for group in once)
    assert answers(served, records, 4, DRAWN) == once
    assert answers(served, records, 4, replace(DRAWN, seed=8)) != once


def test_a_prompt_that_is_too_long_leaves_the_others_sampled(kind, served):
    if kind == "transformers":
        pytest.skip("it has no limit")
    long = make_record("long", "What is 3 plus 4? " * 200)
    prompts = [served.prompts.process(record) for record in (RECORDS[0], long, RECORDS[1])]
    with pytest.raises(
        PromptsRefusedError, match=r"^long: .* refuses the prompt: status 400: .*maximum context"
    ) as caught:
        served.sampler.generate(prompts, 1, GREEDY)
    assert [group is None for group in caught.value.groups] == [False, True, False]


def test_another_model_is_named(kind, served):
    wrong = ask(served.sampler.url.removesuffix("/v1"), "tinny")
    says = (
        r"404: .*is there the model 'tinny' \(rollout.openai.model\)" if kind == "vllm" else "400: .*requested 'tinny'"
    )
    with pytest.raises(EngineError, match=f"status {says}"):
        answers(wrong, RECORDS, 1, GREEDY)


def test_a_server_that_dies_ends_the_call(tmp_path):
    port = free_port()
    with serve("vllm", tmp_path, port) as run:
        model = ask(wait_up(run, port), "tiny", concurrency=2, retries=1)
        prompts = [model.prompts.process(make_record(str(i), f"What is {i} plus 4?")) for i in range(200)]
        done = []

        def on_group(i, group):
            if not done:
                run.kill_all()
            done.append(i)

        with pytest.raises(
            EngineError, match=r"/chat/completions: (ConnectError|ReadError|RemoteProtocolError).*2 tries"
        ):
            model.sampler.generate(prompts, 1, GREEDY, on_group=on_group)
    assert 0 < len(done) < 200
