"""A run whose sampling and training do not compute the same stops, and says which computation is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from accelerate.state import AcceleratorState

from spark_vl.policy import policy as policy_module
from spark_vl.policy.check import LogprobCheck, LogprobGapError
from spark_vl.policy.packing import PackItem, make_pack
from spark_vl.rollout import Sampling
from spark_vl.run.sinks import Sink
from spark_vl.setup import load_trainer
from tests.test_trainer import make_config, metrics, write_rows

GAP = "rollout/sampler_logprob_gap"


def causal(pack, backend):
    """An attention mask as if a pack were one text."""
    length = len(pack.item_T)
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@pytest.fixture(params=["float32", "bfloat16"])
def trainer(request, tmp_path):
    """A trainer on problems with one image."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
    yield load_trainer(make_config(tmp_path / "run", f"--model.dtype={request.param}"))
    AcceleratorState._reset_state(reset_partial_state=True)


def sample(trainer):
    """Prompts with their groups of four."""
    prompts = trainer.feed.next("problems")
    with trainer.accelerator.autocast():
        groups = trainer.engine.generate(prompts, 4, Sampling(max_new_tokens=24))
    return list(zip(prompts, groups, strict=True))


def make_check(trainer, said=None, **settings) -> LogprobCheck:
    config = replace(trainer.config, rollout=replace(trainer.config.rollout, **settings))
    check = LogprobCheck(config, trainer.updater, trainer.log, trainer.checkpoints.folder)
    check.log = FakeLog(said if said is not None else [])
    return check


class FakeLog:
    def __init__(self, said):
        self.say = said.append

    def phase(self, name):
        pass


def gaps(message: str) -> dict[str, float]:
    """The three gaps that a message lists."""
    listed = re.findall(r"(\w+) and (\w+) by ([\d.e+-]+|nan)", message)
    return {f"{a}-{b}": float(value) for a, b, value in listed}


def test_a_sound_model_passes_once_and_trains_on(trainer):
    said = []
    check = make_check(trainer, said)
    scored = sample(trainer)
    check(1, scored)
    [line] = said
    assert gaps(line).keys() == {"packed-alone", "packed-sampler", "alone-sampler"}
    assert max(gaps(line).values()) < (1e-6 if trainer.config.model.dtype == "float32" else 1e-2)
    assert trainer.updater.policy.training
    check(2, [])  # would not find a group
    assert len(said) == 1


def test_prompts_without_an_image_pass(tmp_path):
    rows = [{"question": f"Which is larger, {i} or 5?", "answer": "5"} for i in range(4)]
    recipe = write_rows(tmp_path, rows, verifier="number")
    trainer = load_trainer(make_config(tmp_path / "run", f"--data.recipes=[{recipe}]"))
    said = []
    make_check(trainer, said)(1, sample(trainer))
    assert max(gaps(said[0]).values()) < 1e-6


def test_a_model_that_ignores_the_mask_of_packed_groups(trainer, monkeypatch):
    scored = sample(trainer)
    monkeypatch.setattr(policy_module, "attention_mask", causal)
    with pytest.raises(LogprobGapError, match=r"update of step 7, .*packed ≠ alone = sampler: the model ignores") as e:
        make_check(trainer)(7, scored)
    found = gaps(str(e.value))
    assert found["alone-sampler"] < 1e-2 < found["packed-alone"]


def test_wrong_positions_in_the_sampler(trainer, monkeypatch):
    decode = type(trainer.engine)._decode

    def shifted(engine, token_R, position_R, mask_RS, cache):
        return decode(engine, token_R, position_R + 3, mask_RS, cache)

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.engine), "_decode", shifted)
        scored = sample(trainer)
    with pytest.raises(LogprobGapError, match="packed = alone ≠ sampler: sampling and training do not") as e:
        make_check(trainer)(1, scored)
    found = gaps(str(e.value))
    assert found["packed-alone"] < 1e-2 < found["alone-sampler"]


@pytest.mark.parametrize(
    ("packed", "alone", "meaning"),
    [
        (1.0, 0.0, "packed ≠ alone = sampler"),
        (0.0, 1.0, "packed = sampler ≠ alone"),
        (1.0, 1.0, "packed = alone ≠ sampler"),
        (1.0, 2.0, "packed ≠ alone ≠ sampler"),
        (float("nan"), 0.0, "packed ≠ alone = sampler"),
    ],
)
def test_what_differs_is_named_with_its_place(trainer, monkeypatch, packed, alone, meaning):
    scored = sample(trainer)
    shown = min(scored, key=lambda pair: fmean(p for rollout in pair[1].rollouts for p in rollout.logprobs))
    lengths = [len(rollout.token_ids) for rollout in shown[1].rollouts]
    score = trainer.updater.score

    def spoiled(passes):
        """Off in the third completion."""
        first, *others = score(passes)
        assert len(others) == 4
        assert len(first) == sum(lengths)
        first[sum(lengths[:2]) : sum(lengths[:3])] += packed
        others[2] += alone
        return [first, *others]

    monkeypatch.setattr(trainer.updater, "score", spoiled)
    with pytest.raises(LogprobGapError, match=meaning) as e:
        make_check(trainer)(1, scored)
    assert f"most in completion 3 of 4 of {shown[0].record.id}; allowed are" in str(e.value)
    if packed == alone == 1.0:
        assert gaps(str(e.value))["alone-sampler"] == pytest.approx(lengths[2] / sum(lengths), abs=0.01)


def test_a_group_that_was_cut_may_lie_in_its_packs_in_any_order(trainer, monkeypatch):
    """As first fit leaves it, where a late short part goes into an early pack that has room."""

    def cut_backward(items, *, tokens_per_pack, padding):
        [whole] = items
        parts = [PackItem(whole.prompt, [ids], [row]) for ids, row in zip(whole.completions, whole.rows, strict=True)]
        return [make_pack([part], padding=padding) for part in reversed(parts)]

    monkeypatch.setattr("spark_vl.policy.check.pack_items", cut_backward)
    said = []
    make_check(trainer, said)(1, sample(trainer))
    assert "passed" in said[0]


def test_the_bound_can_be_set_and_the_check_switched_off(trainer, monkeypatch):
    scored = sample(trainer)
    with pytest.raises(LogprobGapError, match=r"allowed are 1e-12 \(rollout\.max_logprob_gap\)"):
        make_check(trainer, max_logprob_gap=1e-12)(1, scored)
    monkeypatch.setattr(trainer.updater, "score", lambda passes: pytest.fail("it was checked"))
    make_check(trainer, max_logprob_gap=1e-12, startup_check=False)(1, scored)


def test_a_gap_in_training_stops_the_run_or_warns(tmp_path, capsys):
    class Tightened(Sink):
        def on_metrics(self, step, metrics):
            trainer.check.max_gap = 1e-12 if step == 3 else 1e-4

    run = tmp_path / "run"
    off = ("--steps=5", "--checkpoint.every=2", "--rollout.startup_check=false")
    trainer = load_trainer(make_config(run, *off))
    trainer.sinks.append(Tightened())
    latest = re.escape(str(run / "checkpoints" / "step-000002"))
    with pytest.raises(
        LogprobGapError, match=rf"step 4: {GAP} is .*allowed are 1e-12 .*the last checkpoint is {latest}"
    ):
        trainer.train()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-000002"]
    assert len(metrics(run)) == 4

    tight = ("--steps=5", "--checkpoint.every=2", "--rollout.max_logprob_gap=1e-12")
    with pytest.raises(LogprobGapError, match="before the update of step 3"):  # it is asked again after a resume
        load_trainer(make_config(run, *tight), resume="auto").train()
    capsys.readouterr()
    warned = (*tight, "--rollout.startup_check=false", "--rollout.on_logprob_gap=warn")
    assert load_trainer(make_config(run, *warned), resume="auto").train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in lines] == ["step 3", "step 4", "step 5"]


def test_dropout_is_no_fault_unless_a_bound_says_so(trainer):
    lora = ("--model.lora.rank=4", "--model.lora.dropout=0.1")

    def told(*settings):
        config = make_config(trainer.checkpoints.folder, *settings)
        LogprobCheck(config, trainer.updater, trainer.log, trainer.checkpoints.folder).on_metrics(3, {GAP: 0.2})

    told(*lora)
    for settings in ((), ("--model.lora.rank=4",), (*lora, "--rollout.max_logprob_gap=0.1")):
        with pytest.raises(LogprobGapError, match=r"step 3: .* is 0\.2 nats per token; .*there is no checkpoint yet"):
            told(*settings)
