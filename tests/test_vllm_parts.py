"""What the vLLM engine is made of, without vLLM; `tests/vllm` has it with."""

from __future__ import annotations

import math
import threading
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch.distributed import TCPStore

from spark_vl.config import ConfigError, TrainConfig
from spark_vl.config_check import check_train_config
from spark_vl.policy.losses import StepTotals, importance_weights, policy_loss
from spark_vl.policy.weights import described, weight_buckets
from spark_vl.records import BadRecordError
from spark_vl.rollout import EngineError, PromptsRefusedError, Sampling
from spark_vl.rollout.serve import server_command
from spark_vl.rollout.vllm_requests import Completion, group_of, sampling_settings
from spark_vl.rollout.weight_channel import WeightChannel
from tests.conftest import make_image, make_record
from tests.test_trainer import load_trainer, make_config


@pytest.fixture(scope="module")
def prompt(processor):
    return processor.process(
        make_record("r", "See", make_image(1), "and", make_image(2, (140, 84)), "What digit do both show?")
    )


# ── prompts ──


def test_an_unexpanded_prompt_has_one_token_an_image_and_expands_to_the_prompt(processor, prompt):
    tokens = processor.unexpanded(prompt)
    counts = iter(image.tokens for image in prompt.images)
    expanded = [token for one in tokens for token in [one] * (next(counts) if one == processor.image_token_id else 1)]
    assert expanded == prompt.input_ids.tolist()
    assert tokens.count(processor.image_token_id) == 2
    for image in prompt.images:
        assert image.resized.size == image.size.processed


def answer(prompt, n=2, **fields):
    fields = {
        "token_ids": [5, 6],
        "logprobs": [-1.0, -2.0],
        "finish_reason": "stop",
        "versions": frozenset("7"),
    } | fields
    return [Completion(**fields)] * n


def test_a_group_is_what_came_back(processor, prompt):
    group = group_of(prompt, 2, "7", prompt.input_ids.tolist(), answer(prompt), processor)
    assert group.record is prompt.record
    assert [rollout.token_ids for rollout in group.rollouts] == [(5, 6)] * 2
    assert group.rollouts[0].text == processor.decode([5, 6])
    assert group_of(prompt, 2, None, prompt.input_ids.tolist(), answer(prompt), processor) == group


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 1}, r"returned 1 completions; asked for 2"),
        ({"finish_reason": "abort"}, r"'abort'; allowed: stop, length"),
        ({"token_ids": [], "logprobs": []}, r"a completion of 0 tokens"),
        ({"logprobs": [-1.0]}, r"1 log-probabilities for 2 tokens"),
        ({"versions": frozenset("6")}, r"version 6; the policy's are 7"),
        ({"versions": frozenset("67")}, r"version 6, 7; the policy's are 7"),
        ({"versions": frozenset()}, r"version unknown"),
    ],
)
def test_what_cannot_be_trained_on_is_an_error(processor, prompt, fields, says):
    with pytest.raises(EngineError, match=says):
        group_of(prompt, 2, "7", prompt.input_ids.tolist(), answer(prompt, **fields), processor)


def test_another_expansion_names_the_record_and_the_place(processor, prompt):
    other = prompt.input_ids.tolist()
    other[4] = 999
    with pytest.raises(BadRecordError, match=r"^r: .* at token 4: \[999\] and"):
        group_of(prompt, 2, "7", other, answer(prompt), processor)
    with pytest.raises(BadRecordError, match=rf"to {len(other) - 3} tokens, the trainer to {len(other)}"):
        group_of(prompt, 2, "7", prompt.input_ids.tolist()[:-3], answer(prompt), processor)


def test_seeds_of_neighbors_do_not_overlap_and_all_that_vllm_might_add_is_said(processor):
    settings = [sampling_settings(Sampling(seed=3), 8, i, processor) for i in range(64)]
    seeds = {each["seed"] + k for each in settings for k in range(8)}
    assert len(seeds) == 64 * 8
    assert all(settings[0][name] == value for name, value in {"top_k": 0, "repetition_penalty": 1.0}.items())
    assert set(settings[0]["logit_bias"]) == set(processor.suppressed_token_ids)


# ── weights ──


@pytest.mark.parametrize("bucket_bytes", [1, 2**16, 2**30])
def test_buckets_are_the_plain_model(make_policy, bucket_bytes):
    policy, accelerator = make_policy(), Accelerator(cpu=True)
    buckets = list(weight_buckets(accelerator, policy, dtype=torch.float32, bucket_bytes=bucket_bytes))
    sent = {name: weight for bucket in buckets for name, weight in bucket}
    plain = policy.plain_state_dict(policy.state_dict())
    assert sent.keys() == plain.keys()
    assert all(torch.equal(sent[name], weight) for name, weight in plain.items())
    for bucket in buckets:
        assert len(bucket) == 1 or sum(weight.nbytes for _, weight in bucket) <= bucket_bytes
    # Copies: what the engine still holds does not move with the policy.
    assert not {weight.data_ptr() for weight in sent.values()} & {p.data_ptr() for p in policy.parameters()}


def test_a_bucket_arrives_as_it_was_sent():
    sent = [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7).to(torch.bfloat16)),  # leaves the next one at an odd place
        ("c", torch.tensor(2.5)),
        ("d", torch.randn(4, 2, 2)),
    ]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    got = []

    def receive(rank: int) -> None:
        other = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=20))
        channel = WeightChannel(other, name="t", rank=rank, size=3, device=torch.device("cpu"), timeout_s=20)
        got.append(channel.receive(described(sent)))

    threads = [threading.Thread(target=receive, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    WeightChannel(store, name="t", rank=0, size=3, device=torch.device("cpu"), timeout_s=20).send(sent)
    for thread in threads:
        thread.join(20)
    assert len(got) == 2
    for arrived in got:
        for (name, weight), (other, found) in zip(sent, arrived, strict=True):
            assert name == other
            assert found.dtype == weight.dtype
            assert torch.equal(found, weight)


# ── the update ──


def test_importance_weights_by_hand():
    own, engine = torch.tensor([math.log(0.5), math.log(0.2), math.log(0.9)]), torch.tensor([0.25, 0.4, 0.1]).log()
    weights = importance_weights(own, engine, 2.0)
    assert weights.tolist() == pytest.approx([2.0, 0.5, 2.0])  # 0.9 / 0.1 is cut


def test_importance_weights_multiply_the_policy_gradient_and_not_the_kl_term():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    arguments = (torch.tensor([1.0]), torch.tensor([0, 0]), torch.tensor([1.0]), StepTotals(1, 2, 8))
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    weights = torch.tensor([0.5, 2.0])
    loss, _ = policy_loss("grpo", logprobs, *arguments, **clips, importance=weights)
    # The gradient of -w · ratio · A at ratio 1 is -w · A, each token with half of the completion's weight.
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == pytest.approx([-0.25, -1.0])
    reference = torch.tensor([-1.5, -1.0])
    plain, _ = policy_loss("grpo", logprobs, *arguments, **clips, ref_logprobs=reference, beta=1.0)
    both, _ = policy_loss("grpo", logprobs, *arguments, **clips, ref_logprobs=reference, beta=1.0, importance=weights)
    alone, _ = policy_loss("grpo", logprobs, *arguments, **clips)
    assert float((both - loss).detach()) == pytest.approx(float((plain - alone).detach()))


# ── settings ──


def test_the_server_gets_the_settings_of_the_run(tmp_path):
    config = TrainConfig()
    config.model.path, config.model.dtype, config.model.max_pixels = "spark_vl/demo/checkpoint", "float32", 50176
    config.data.max_prompt_tokens, config.rollout.max_new_tokens, config.evaluation.max_new_tokens = 256, 32, 64
    command = server_command(config, host="127.0.0.1", port=8123)
    flags = dict(pairwise(command))
    assert flags["serve"] == config.model.path
    assert flags["--max-model-len"] == str(256 + 64)
    assert flags["--generation-config"] == "vllm"
    assert flags["--logprobs-mode"] == "processed_logprobs"
    assert '"longest_edge": 50176' in flags["--mm-processor-kwargs"]
    assert flags["--limit-mm-per-prompt"] == '{"image": 256, "video": 0}'
    assert "--gpu-memory-utilization" not in flags


@pytest.mark.parametrize(
    ("servers", "says"),
    [([], r"rollout\.vllm\.servers: is empty"), (["node7:8000"], r"found 'node7:8000'; allowed: http://HOST:PORT")],
)
def test_servers_have_to_be_named(servers, says):
    config = TrainConfig()
    config.data.recipes = ["digits"]
    config.rollout.engine, config.rollout.vllm.mode, config.rollout.vllm.servers = "vllm", "server", servers
    with pytest.raises(ConfigError, match=says):
        check_train_config(config)


# ── the run ──


def test_an_engine_that_fails_leaves_a_checkpoint_of_the_last_step(tmp_path, monkeypatch):
    whole = make_config(tmp_path / "whole", "--steps=3", "--checkpoint.every=0")
    load_trainer(whole).train()
    config = make_config(tmp_path / "run", "--steps=3", "--checkpoint.every=0")
    trainer = load_trainer(config)
    calls = []

    def generate(*args, engine=trainer.engine, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise EngineError("the servers are gone")
        return type(engine).generate(engine, *args, **kwargs)

    monkeypatch.setattr(trainer.engine, "generate", generate)
    with pytest.raises(EngineError, match="the servers are gone"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == trainer.checkpoints.folder.glob(
        "step-*"
    ).__next__().name
    load_trainer(config, resume="auto").train()
    model = "model/model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


def test_prompts_that_the_engine_refuses_are_quarantined_and_the_others_trained_on(tmp_path, monkeypatch):
    trainer = load_trainer(make_config(tmp_path, "--steps=1", "--data.max_quarantined_fraction=1"))
    refused = []

    def generate(prompts, n, sampling, progress, on_group, engine=trainer.engine):
        groups = type(engine).generate(engine, prompts, n, sampling, progress)
        name = prompts[0].record.id
        refused.append(name)
        for i, group in enumerate(groups[1:], 1):
            on_group(i, group)
        raise PromptsRefusedError([None, *groups[1:]], {0: BadRecordError(name, "it has another length")})

    monkeypatch.setattr(trainer.engine, "generate", generate)
    assert trainer.train()
    listed = (tmp_path / "quarantine.jsonl").read_text()
    assert f'"{refused[0]}"' in listed
    assert "it has another length" in listed
