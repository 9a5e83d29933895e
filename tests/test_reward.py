"""The model as a judge: probabilities against plain transformers, orders and ranks against numbers made by hand."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from PIL import Image

from spark_vl import GenerativeReward, Ranking, Templater
from spark_vl.config import ConfigError, JudgeConfig, ModelConfig, OpenAIConfig
from spark_vl.demo import digits
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import REASONING_SUFFIX, TEMPLATES
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import BadRecordError, Rollout, RolloutGroup, plain_text
from spark_vl.reward import judge as judge_module
from spark_vl.reward.labels import alternatives
from spark_vl.rollout import Sampling
from spark_vl.rollout.engine import PromptsRefusedError, nothing
from tests.conftest import make_image, make_record
from tests.test_openai_engine import Said, reply, serving

TEMPLATER = Templater.load([TEMPLATES], builtin=False, reasoning_suffix=REASONING_SUFFIX)


class Scripted:
    """A `Sampler` that says `reply(record, i)` as sample `i`."""

    def __init__(self, processor, reply, finish_reason="stop"):
        self.processor, self.reply, self.finish_reason = processor, reply, finish_reason
        self.asked = []

    def generate(self, prompts, n, sampling, progress=nothing, on_group=nothing):
        self.asked += [prompt.record for prompt in prompts]
        groups = [
            RolloutGroup(p.record, tuple(self._rollout(self.reply(p.record, i)) for i in range(n))) for p in prompts
        ]
        for i in reversed(range(len(groups))):  # they are complete in any order
            on_group(i, groups[i])
        return groups

    def close(self):
        self.closed = True

    def _rollout(self, text):
        ids = (*self.processor.encode(text), *self.processor.stop_token_ids[:1])
        return Rollout(ids, (0.0,) * len(ids), text, self.finish_reason)


class Refusing(Scripted):
    """One that refuses the prompts that say "bad"."""

    def generate(self, prompts, n, sampling, progress=nothing, on_group=nothing):
        groups = super().generate(prompts, n, sampling)
        reason = BadRecordError("x", "the server refuses it")
        reasons = {i: reason for i, prompt in enumerate(prompts) if "bad" in shown(prompt.record)}
        if reasons:
            raise PromptsRefusedError([None if i in reasons else group for i, group in enumerate(groups)], reasons)
        return groups


def votes(processor, reply, templater=TEMPLATER, **settings):
    """A judge that counts votes, whose model says `reply`."""
    return GenerativeReward(Scripted(processor, reply), processor, templater, sampling=Sampling(), **settings)


def in_favor(record):
    return rf"so \boxed{{{record.gold}}}"


def against(record):
    return rf"so \boxed{{{next(label for label in record.choices if label != record.gold)}}}"


def shown(record):
    return plain_text(record.messages[-1].content)


# ── probabilities ──


def by_hand(model, processor, prompt, before, labels):
    """Softmax over the summed log-probabilities of each label's tokens behind `before`, from Hugging Face's own forward
    pass on the label's whole sequence, its own positions, and no batch."""
    sums = []
    for label in labels:
        head, tail = processor.encode(before), processor.encode(label)
        ids = torch.tensor([[*prompt.input_ids.tolist(), *head, *tail]])
        is_image = (ids == model.config.image_token_id).int()
        images = {
            "pixel_values": torch.cat([image.pixel_values for image in prompt.images]),
            "image_grid_thw": torch.stack([image.grid_thw for image in prompt.images]),
        }
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=is_image, **images).logits[0].double()
        logits[:, list(processor.suppressed_token_ids)] = -torch.inf
        scores = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        sums.append(scores[-len(tail) :].sum())
    return torch.stack(sums).softmax(0).tolist()


def test_the_probability_of_a_verdict_is_that_of_its_label_behind_its_reasons(tiny, processor, make_policy):
    model, _ = tiny
    policy = make_policy().eval()
    engine = Scripted(processor, lambda record, i: r"look é: \boxed{No} wait, \boxed{\text{Yes}}. ok")
    judge = GenerativeReward(engine, processor, TEMPLATER, sampling=Sampling(), policy=policy)
    questions = [(make_image(1), "Which digit is larger?"), ("And ", make_image(2, (84, 56)), " in this?")]
    found = judge.pointwise(questions, None, ["7", "3"])
    for judgment, record in zip(found, engine.asked, strict=True):
        before = r"look é: \boxed{No} wait, \boxed{\text{"
        expected = by_hand(model, processor, processor.process(record), before, ("Yes", "No"))
        assert judgment.probability == pytest.approx(expected[0], rel=1e-4)
        [[reply]] = judgment.orders
        assert (reply.label, reply.in_favor, judgment.status) == ("Yes", True, "ok")
    assert found[0].probability != pytest.approx(found[1].probability, rel=1e-3)


def test_both_orders_of_a_pair_are_averaged(tiny, processor, make_policy):
    """The label in favor is A in the first order and B in the second, whatever the model says."""
    model, _ = tiny
    engine = Scripted(processor, lambda record, i: r"\boxed{a}")
    judge = GenerativeReward(engine, processor, TEMPLATER, sampling=Sampling(), policy=make_policy().eval())
    judgment = judge.pairwise((make_image(1), "Which?"), None, "7", "3")
    first, second = engine.asked
    assert 'A: "7" B: "3"' in shown(first)
    assert 'A: "3" B: "7"' in shown(second)
    one = by_hand(model, processor, processor.process(first), r"\boxed{", ("a", "b"))[0]
    two = by_hand(model, processor, processor.process(second), r"\boxed{", ("a", "b"))[1]
    assert judgment.probabilities == pytest.approx([one, two], rel=1e-4)
    assert judgment.probability == pytest.approx((one + two) / 2, rel=1e-4)
    assert [order[0].in_favor for order in judgment.orders] == [True, False]


class Merging:
    """A tokenizer of the given tokens; of several that fit, the longest."""

    tokens = ("{Yes", "{No", "ed{", "\\box", "ed", "{", "so", " ", "Y", "es", "No", "}", ".")

    def encode(self, text):
        ids = []
        while text:
            token = max((t for t in self.tokens if text.startswith(t)), key=len)
            ids.append(self.tokens.index(token))
            text = text[len(token) :]
        return ids

    def decode(self, ids):
        return "".join(self.tokens[i] for i in ids)


@pytest.mark.parametrize(
    ("said", "kept", "labels"),
    [
        (("so", " ", "\\box", "ed", "{Yes", "}"), 4, (["{Yes"], ["{No"])),  # the brace belongs to the label's token
        (("so", " ", "\\box", "ed{", "Y", "es", "}", "."), 4, (["Y", "es"], ["No"])),
    ],
)
def test_tokens_that_reach_into_the_label_are_spelled_anew(processor, said, kept, labels):
    merging = Merging()
    rendered = TEMPLATER.pointwise(("Right?",), "7", correct=True, rng=random.Random(0), template="demo/yes_no_1")
    record = rendered.record(make_record("p", "Right?"), "pointwise", id="p#pointwise")
    prompt = processor.process(record)
    ids = tuple(merging.tokens.index(token) for token in said)
    found = alternatives(prompt, Rollout(ids, (0.0,) * len(ids), "".join(said), "stop"), merging)
    assert found.before.input_ids.tolist() == [*prompt.input_ids.tolist(), *ids[:kept]]
    after = torch.arange(kept) + prompt.next_position
    assert torch.equal(found.before.position_ids[..., len(prompt.input_ids) :], after.expand(3, -1))
    assert [[merging.tokens[i] for i in label] for label in found.labels] == list(labels)


# ── votes ──


def test_votes_are_shares_of_the_replies_that_have_a_verdict(processor):
    said = [in_favor, against, lambda record: "no box", in_favor]
    judge = votes(processor, lambda record, i: said[i](record), samples=4)
    judgment = judge.pointwise("Right?", None, "7")
    assert judgment.probability == pytest.approx(2 / 3)
    assert [reply.in_favor for reply in judgment.orders[0]] == [True, False, None, True]


def test_a_judge_that_prefers_a_place_is_undecided_and_inconsistent(processor):
    judgment = votes(processor, lambda record, i: r"\boxed{A}").pairwise("Which?", None, "7", "3")
    assert (judgment.probability, judgment.consistent, judgment.status) == (0.5, False, "ok")
    judgment = votes(processor, lambda record, i: in_favor(record)).pairwise("Which?", None, "7", "3")
    assert (judgment.probability, judgment.consistent) == (1.0, True)


@pytest.mark.parametrize("reply", ["no box", r"\boxed{C}", r"\boxed{A or B}", r"\boxed{A", ""])
def test_what_says_no_label_is_unparsable_and_has_no_probability(processor, make_policy, reply):
    """Also where one order alone is: the other one would be of the place as well as of the answers."""
    judge = votes(processor, lambda record, i: reply if record.gold == "A" else in_favor(record))
    judgment = judge.pairwise("Which?", None, "7", "3")
    assert (judgment.probability, judgment.status, judgment.consistent) == (None, "unparsable", None)
    assert judgment.probabilities == [None, 1.0]
    engine = Scripted(processor, lambda record, i: reply)
    scored = GenerativeReward(engine, processor, TEMPLATER, sampling=Sampling(), policy=make_policy().eval())
    judgment = scored.pointwise("Right?", None, "7")
    assert (judgment.probability, judgment.status, judgment.rationale) == (None, "unparsable", reply)


def test_a_question_with_options_is_asked_with_either_at_a(processor):
    judge = votes(processor, lambda record, i: r"\boxed{A}", pointwise_template="demo/ab_1")
    judgment = judge.pointwise("Which?", None, "7")
    assert [shown(record).partition("A: ")[2] for record in judge.engine.asked] == [
        r"right B: wrong \boxed{A} or \boxed{B}",
        r"wrong B: right \boxed{A} or \boxed{B}",
    ]
    assert (judgment.probability, judgment.consistent) == (0.5, False)


# ── questions ──


def test_images_stand_where_the_question_and_the_answers_have_them(processor, tmp_path):
    asked, one, two = (make_image(seed) for seed in (1, 2, 3))
    judge = votes(processor, lambda record, i: in_favor(record))
    judge.pairwise((asked, "Like this"), None, ("It is ", one), (two, " it is"))
    assert [record.images for record in judge.engine.asked] == [(asked, one, two), (asked, two, one)]

    file = tmp_path / "picture.png"
    file.write_bytes(asked.data)
    record = make_record("p", asked, "Which?")
    judge = votes(processor, lambda record, i: in_favor(record))
    for question, images in [
        ("Which?", [asked]),
        ("Which?", [asked.data]),
        ("Which?", [file]),
        ("Which?", [str(file)]),
        ("<image>Which?", [asked]),
        ((asked, "Which?"), None),
        (record, None),
    ]:
        judge.pointwise(question, images, "7")
    assert len({record.messages for record in judge.engine.asked}) == 1
    pixels = Image.open(io.BytesIO(asked.data))
    [prompt] = judge.ask_pointwise("Which?", [pixels], "7")
    expected = processor.process(judge.engine.asked[0]).images[0].pixel_values
    assert torch.equal(prompt.images[0].pixel_values, expected)


def test_lists_give_lists_and_mistakes_are_said(processor):
    judge = votes(processor, lambda record, i: in_favor(record) if '"7"' in shown(record) else against(record))
    assert [j.probability for j in judge.pointwise(["Q", "Q"], None, ["7", "3"])] == [1.0, 0.0]
    assert [j.probability for j in judge.pairwise(["Q"], [[make_image(1)]], ["7"], ["7"])] == [1.0]
    assert judge.pointwise([], None, []) == []
    with pytest.raises(ValueError, match=r"have lengths 2, 2, 1; allowed: the same"):
        judge.pointwise(["Q", "Q"], None, ["7"])
    with pytest.raises(ValueError, match="found 1 beside a question that holds its images itself"):
        judge.pointwise(("Q",), [make_image(1)], "7")
    with pytest.raises(ValueError, match="the text has 2 placeholders"):
        judge.pointwise("<image> and <image>", [make_image(1)], "7")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        judge.pointwise("Q", ["nowhere.png"], "7")
    with pytest.raises(BadRecordError, match="at most 4096 are allowed"):
        judge.pointwise("Q " * 5000, None, "7")
    with pytest.raises(ValueError, match=r"pairwise_template: found 'demo/ab_1'; allowed: demo/pairwise_1, demo/pair"):
        votes(processor, lambda record, i: "", pairwise_template="demo/ab_1")
    with pytest.raises(ValueError, match="samples: found 0"):
        votes(processor, lambda record, i: "", samples=0)


# ── ranks ──


def test_ranks_follow_from_the_table_of_pairs(processor):
    """Votes of a judge that prefers the larger answer, but cannot tell neighbors apart, and cannot read an 8."""

    def reply(record, i):
        [a, b] = [int(part.partition('"')[0]) for part in shown(record).split(': "')[1:]]
        return "?" if 8 in (a, b) else rf"\boxed{{{'A' if a + 1 >= b else 'B'}}}"

    judge = votes(processor, reply)
    answers = ["1", "5", "8", "4"]
    ranking = judge.rank("Which?", None, answers)
    nan = None
    assert ranking.table == ((nan, 0.0, nan, 0.0), (1.0, nan, nan, 0.5), (nan, nan, nan, nan), (1.0, 0.5, nan, nan))
    assert ranking.scores == (0.0, 0.75, None, 0.75)
    assert ranking.order == (1, 3, 0, 2)
    assert judge.best_of("Which?", None, answers) == 1
    for order in permutations(range(4)):  # what is best does not depend on where it was given
        other = judge.rank("Which?", None, [answers[i] for i in order])
        assert {answers[order[i]] for i in other.order[:2]} == {"5", "4"}
        assert [answers[order[i]] for i in other.order[2:]] == ["1", "8"]
    assert judge.rank(["Which?"] * 2, None, [["1", "4"], ["8"]]) == [
        Ranking((1, 0), (0.0, 1.0), ((None, 0.0), (1.0, None))),
        Ranking((0,), (None,), ((None,),)),
    ]
    assert judge.best_of(["Which?"] * 2, None, [["1", "8"], ["8"]]) == [None, 0]
    with pytest.raises(ValueError, match="answers: found none"):
        judge.rank("Which?", None, [])


def test_answers_can_be_ranked_one_by_one(processor):
    said = {"1": [against] * 4, "2": [in_favor, against] * 2, "3": [in_favor] * 4, "4": [lambda record: "?"] * 4}
    judge = votes(processor, lambda record, i: said[shown(record).split('"')[1]][i](record), samples=4)
    ranking = judge.rank("Which?", None, ["1", "2", "3", "4"], by="pointwise")
    assert ranking == Ranking((2, 1, 0, 3), (0.0, 0.5, 1.0, None), ())
    assert len(judge.engine.asked) == 4


# ── a trained model ──


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The demo's checkpoint as a run saves it."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(CHECKPOINT, folder)
    TEMPLATER.save(folder / PROMPTS_FILE)
    limits = {"model.dtype": "float32", "model.min_pixels": 784, "model.max_pixels": 50176}
    limits |= {"rollout.temperature": 1.0, "rollout.max_new_tokens": 32, "max_prompt_tokens": 256}
    (folder / "spark_training.json").write_text(json.dumps({"limits": limits}))
    return folder


def test_a_trained_model_is_asked_in_its_own_words_within_its_own_limits(trained):
    judge = GenerativeReward.from_pretrained(str(trained))
    assert judge.templater.templates == TEMPLATER.templates
    assert (judge.policy.model.dtype, judge.processor.max_prompt_tokens) == (torch.float32, 256)
    assert judge.sampling == Sampling(0.0, 1.0, 32, 0)
    problems = [digits.problem("test", i) for i in range(8)]
    arguments = [p.question for p in problems], [[p.image] for p in problems], [p.answer for p in problems]
    judged = judge.pointwise(*arguments)
    assert all(judgment.status == "ok" for judgment in judged)
    for judgment in judged:  # greedy: the label that it says is the likelier one
        [[reply]] = judgment.orders
        assert reply.in_favor == (reply.probability > 0.5)

    by_votes = GenerativeReward.from_pretrained(str(trained), probability="votes", samples=3)
    assert by_votes.sampling.temperature == 1.0
    assert all(j.probability in (None, 0.0, 1 / 3, 0.5, 2 / 3, 1.0) for j in by_votes.pointwise(*arguments))
    with pytest.raises(ConfigError, match="pointwise_template: found 'x'"):
        GenerativeReward.from_config(JudgeConfig(model=ModelConfig(path=str(trained)), pointwise_template="x"))


def test_an_engine_of_ones_own_needs_no_weights_here(trained, processor, monkeypatch):
    monkeypatch.setattr(judge_module, "load_sampler", None)
    engine = Scripted(processor, lambda record, i: in_favor(record))
    judge = GenerativeReward.from_pretrained(str(trained), engine=engine, probability="votes")
    assert judge.pointwise("Which?", None, "7").probability == 1.0
    with pytest.raises(ConfigError, match="engine: found 'sglang'; allowed: transformers, vllm, openai, or a Sampler"):
        GenerativeReward.from_pretrained(str(trained), engine="sglang")


def test_a_server_is_asked_in_the_models_words_and_votes(trained):
    """One that speaks OpenAI's chat completions: 7 is right, and better than all; a question about 13 is refused."""

    def answer(body):
        text = json.dumps(body["messages"])
        if 'Answer: \\"13' in text:
            raise Said(400, "too long")
        asked = re.search(r'A: \\"(\d+)\\" B: \\"(\d+)\\"', text)
        said = ("A" if asked[1] == "7" else "B") if asked else ("Yes" if 'Answer: \\"7\\"' in text else "No")
        return reply(rf"so \boxed{{{said}}}", tokens=5)

    with serving(answer) as server:
        settings = {"engine": "openai", "openai": OpenAIConfig(base_url=server.url, retries=0)}
        judge = GenerativeReward.from_pretrained(str(trained), probability="votes", samples=2, **settings)
        found = judge.pointwise(["Which?"] * 2, [[make_image(1)], None], ["7", "3"])
        assert [judgment.probability for judgment in found] == [1.0, 0.0]
        assert {said.tokens for judgment in found for order in judgment.orders for said in order} == {5}
        assert judge.rank("Which?", None, ["3", "7"]).order == (1, 0)
        with pytest.raises(BadRecordError, match="too long"):
            judge.pointwise("Which?", None, "13")
        judge.close()
        asked = len(server.asked)
        with pytest.raises(ConfigError, match=r"probability: is labels, but with rollout\.engine: openai"):
            GenerativeReward.from_pretrained(str(trained), **settings)
        assert len(server.asked) == asked
    first = server.asked[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == (str(trained), 32, 1.0)
    assert {part["type"] for part in first["messages"][-1]["content"]} == {"image_url", "text"}
    with pytest.raises(ConfigError, match=r"rollout\.openai\.base_url: is null"):
        GenerativeReward.from_pretrained(str(trained), engine="openai", probability="votes")
