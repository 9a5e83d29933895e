"""Servers that misbehave: what another try cures is tried again, all else stops clearly, and nothing is mixed up."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import httpx
import pytest

from spark_vl.policy.update import load_updater
from spark_vl.rollout import EngineError, PromptsRefusedError, Sampling, load_engine
from tests.conftest import make_image, make_record
from tests.vllm.conftest import free_port, run_config
from tests.vllm.proxy import Proxy

pytestmark = pytest.mark.vllm

DRAWN = Sampling(1.0, 1.0, 16, 7)


@pytest.fixture(scope="module")
def updater(run_accelerator, run_processor):
    return load_updater(run_config(), run_accelerator, run_processor, updates=10)


@pytest.fixture(scope="module")
def prompts(run_processor):
    return [
        run_processor.process(make_record(f"p{i}", make_image(i, (56 + 28 * (i % 3), 84)), f"What is {i} plus 4?"))
        for i in range(6)
    ]


@pytest.fixture
def proxy(server):
    proxy = Proxy(server())
    yield proxy
    proxy.close()


@pytest.fixture
def engine(proxy, run_accelerator, updater, run_processor, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    config = run_config(mode="server", servers=[proxy.url], retries=1, timeout_s=3.0)
    engine = load_engine(config, run_accelerator, updater, run_processor)
    engine.generate([], 1, DRAWN)  # weights and canary
    proxy.asked.clear()
    yield engine
    engine.close()


def without_last(answer):
    return answer | {"choices": answer["choices"][:-1]}


def stale(answer):
    for choice in answer["choices"]:
        choice["weight_versions"] = [{"version": "another run/3", "start": 0, "end": 99}]
    return answer


def aborted(answer):
    answer["choices"][0]["finish_reason"] = "abort"
    return answer


FAULTS = {
    "internal error": (500, "status 500"),
    "overloaded": (503, "status 503"),
    "connection lost": ("drop", "RemoteProtocolError|ReadError|ConnectError"),
    "too slow": ("slow", "ReadTimeout"),
    "too few completions": (without_last, "returned 3 completions; asked for 4"),
    "stale weights": (stale, "sampled from weights of version another run/3"),
    "aborted": (aborted, "'abort'"),
}


@pytest.mark.parametrize(("fault", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_tried_again_and_a_lasting_one_stops_with_its_reason(engine, proxy, prompts, fault, says):
    right = engine.generate(prompts, 4, DRAWN)
    proxy.faults[:] = [fault]
    assert engine.generate(prompts, 4, DRAWN) == right
    proxy.faults[:] = [fault] * 20
    with pytest.raises(EngineError, match=rf"p\d: http.*({says}).*2 tries"):
        engine.generate(prompts, 4, DRAWN)
    proxy.faults.clear()
    assert engine.generate(prompts, 4, DRAWN) == right


def test_each_prompt_is_sent_once_with_each_image_once_and_gets_its_own_completions(engine, proxy, prompts):
    groups = engine.generate(prompts, 4, DRAWN)
    assert len(proxy.asked) == 6
    assert all(body["sampling_params"]["n"] == 4 and len(body["content_parts"]) == 1 for body in proxy.asked)
    assert [group.record.id for group in groups] == [f"p{i}" for i in range(6)]
    # Answers that come in another order are not mixed up: the slow one is the first.
    proxy.faults[:] = [lambda answer: (threading.Event().wait(1), answer)[1]]
    assert engine.generate(prompts, 4, DRAWN) == groups


def test_weights_arrive_while_a_request_that_was_given_up_still_runs(engine, proxy, prompts):
    right = engine.generate(prompts, 4, DRAWN)
    settings = engine._asked(prompts[:1], 64, replace(DRAWN, max_new_tokens=900))[0][2] | {"stop_token_ids": []}
    body = {"token_ids": [5, 6, 7], "sampling_params": settings}
    left = threading.Thread(target=httpx.post, args=(f"{proxy.target}/inference/v1/generate",), kwargs={"json": body})
    left.start()
    threading.Event().wait(1)
    assert left.is_alive()
    engine.sync_weights(engine.policy)
    assert engine.generate(prompts, 4, DRAWN) == right
    left.join(20)
    assert not left.is_alive()


def test_a_refused_request_is_not_repeated(engine, proxy, prompts):
    proxy.faults[:] = [400]
    with pytest.raises(PromptsRefusedError, match="refuses the prompt: status 400"):
        engine.generate(prompts, 2, DRAWN)
    assert len(proxy.asked) == 6


def test_servers_that_are_not_there_or_are_something_else(server, run_accelerator, updater, run_processor):
    config = run_config(mode="server", servers=[f"http://127.0.0.1:{free_port()}"], start_timeout_s=0.2)
    with pytest.raises(EngineError, match=r"is not up after .*spark-vl serve-rollouts"):
        load_engine(config, run_accelerator, updater, run_processor)
    config = run_config(mode="server", servers=[server()])
    config.model.dtype = "bfloat16"
    with pytest.raises(EngineError, match="does not serve the model of this run: dtype: float32, the run has bfloat16"):
        load_engine(config, run_accelerator, updater, run_processor)


def test_a_server_for_shorter_prompts_is_told_apart(server, run_accelerator, updater, run_processor):
    config = run_config(mode="server", servers=[server()])
    config.data.max_prompt_tokens = 2000
    with pytest.raises(EngineError, match="tokens; this run has up to 2024"):
        load_engine(config, run_accelerator, updater, run_processor)


def test_a_server_without_the_flags_is_told_apart(proxy, run_accelerator, updater, run_processor, monkeypatch):
    monkeypatch.setattr(proxy, "target", proxy.target + "/v1")  # answers 404
    config = run_config(mode="server", servers=[proxy.url], start_timeout_s=0.2)
    with pytest.raises(EngineError, match=r"404|not up"):
        load_engine(config, run_accelerator, updater, run_processor)


def test_a_server_that_cannot_be_reached_is_left_out_until_it_can(server, run_accelerator, updater, run_processor):
    first, second = Proxy(server()), Proxy(server())
    said = []
    config = run_config(mode="server", servers=[first.url, second.url], retries=0, timeout_s=10.0)
    engine = load_engine(config, run_accelerator, updater, run_processor, say=said.append)
    second.close()
    prompt = run_processor.process(make_record("p", "What is 1 plus 4?"))
    groups = engine.generate([prompt] * 3, 2, DRAWN)
    assert engine.backend.alive == [first.url]
    assert "is left out" in said[0]
    assert len(groups) == 3
    engine.close()
    first.close()


def test_requests_are_spread_over_the_servers(server, run_accelerator, updater, run_processor, prompts):
    """Behind both addresses is the one server of this session, so its weights are sent to one of them only."""
    first, second = Proxy(server()), Proxy(server())
    config = run_config(mode="server", servers=[first.url], retries=1, timeout_s=10.0)
    engine = load_engine(config, run_accelerator, updater, run_processor)
    right = engine.generate(prompts, 2, DRAWN)
    first.asked.clear()
    engine.backend.alive = [first.url, second.url]
    assert engine.generate(prompts, 2, DRAWN) == right
    assert (len(first.asked), len(second.asked)) == (3, 3)
    second.faults[:] = ["drop"] * 3  # the other one takes over
    assert engine.generate(prompts, 2, DRAWN) == right
    engine.close()
    for proxy in (first, second):
        proxy.close()


def test_limits_of_sampling_are_said(engine, prompts):
    longest = engine.generate(prompts[:1], 2, replace(DRAWN, max_new_tokens=3))
    assert all(len(rollout.token_ids) <= 3 for rollout in longest[0].rollouts)
    assert {rollout.finish_reason for rollout in longest[0].rollouts} <= {"length", "stop"}
