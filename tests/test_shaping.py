from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_vl.records import ImageSize, PromptRecord, Rollout, RolloutGroup, Verdict
from spark_vl.verifiers import VerifierPool, verify_groups
from spark_vl.verifiers.shaping import NGRAM, SHAPING, format_term, overlong_term, repetition_term


def rollout(tokens: int | list[int], text: str = r"\boxed{5}", finish_reason: str = "stop") -> Rollout:
    ids = tuple(range(tokens)) if isinstance(tokens, int) else tuple(tokens)
    return Rollout(ids, (-0.5,) * len(ids), text, finish_reason)


RIGHT, UNPARSABLE = Verdict(1.0, "5"), Verdict(0.0, None, "unparsable", "no box")


@pytest.mark.parametrize(
    ("verdict", "finish_reason", "expected"),
    [
        (RIGHT, "stop", 1),
        (Verdict(0.0, "6"), "stop", 1),  # wrong, but in the format that is asked for
        (RIGHT, "length", 0),
        (UNPARSABLE, "stop", 0),
    ],
)
def test_format(verdict: Verdict, finish_reason: str, expected: float) -> None:
    assert format_term(rollout(3, finish_reason=finish_reason), verdict, None) == expected


FENCE = "```json\n{}\n```"


@pytest.mark.parametrize(
    ("kind", "gold", "reply", "expected"),
    [
        ("iou", "[20, 20, 60, 60]", FENCE.format("[20, 20, 60, 60]"), 1),
        ("point", "[20, 20, 60, 60]", FENCE.format("[40, 40]"), 1),
        ("detection", "[[20, 20, 60, 60]]", FENCE.format("[[0, 0, 60, 60]]"), 1),
        ("json_field", '{"answer": "cat"}', FENCE.format('{"answer": "dog"}'), 1),
        ("json_field", '{"answer": "cat"}', FENCE.format('{"reply": "cat"}'), 0),
        ("iou", "[20, 20, 60, 60]", "It is to the left.", 0),
        ("number", "5", r"\boxed{5}", 1),
        ("number", "5", "5", 0),
        ("number", "5", r"\boxed{}", 0),
        ("text", "cat", r"\boxed{\text{}}", 0),
        ("text", "cat", r"\boxed{...}", 0),
        ("choice", "A", r"\boxed{...}", 0),
        ("list", "1, 2", r"\boxed{...}", 0),
        ("list", "1, 2", r"\boxed{\text{}}", 0),
    ],
)
def test_format_goes_by_what_the_verifier_reads(kind: str, gold: str, reply: str, expected: float) -> None:
    sizes = (ImageSize((200, 100), (200, 100)),)
    record = PromptRecord(
        "r", "problem", (), (), gold, kind, "toy", image_sizes=sizes, coordinates="original", shaping=(("format", 0.1),)
    )
    with VerifierPool() as pool:
        [verified] = verify_groups(pool, [RolloutGroup(record, (rollout(3, reply),))])
    assert verified.verdicts[0].shaping == (("format", expected),)


@pytest.mark.parametrize(  # the limit is 20480, the length that is expected 16384: the run of the paper
    ("tokens", "expected"),
    [(1, 0), (16384, 0), (16385, -1 / 4096), (17408, -0.25), (18432, -0.5), (20479, -4095 / 4096), (20480, -1)],
)
def test_overlong_is_equation_13_of_dapo(tokens: int, expected: float) -> None:
    assert overlong_term(rollout(tokens), RIGHT, 20480) == pytest.approx(expected, abs=1e-12)


def test_overlong_of_a_small_limit() -> None:
    assert [overlong_term(rollout(n), RIGHT, 10) for n in (0, 8, 9, 10)] == [0, 0, -0.5, -1]
    assert [overlong_term(rollout(n), RIGHT, 1) for n in (0, 1)] == pytest.approx([0, -1])


def test_overlong_needs_the_limit() -> None:
    with pytest.raises(ValueError, match="overlong needs the limit on new tokens"):
        overlong_term(rollout(5), RIGHT, None)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([7] * (NGRAM - 1), 0),  # no passage is that long
        ([7] * NGRAM, 0),  # one
        ([7] * (NGRAM + 1), -1 / 2),  # two, the same
        ([7] * (NGRAM + 3), -3 / 4),
        (list(range(100)), 0),
        (list(range(NGRAM)) * 2, -1 / 21),  # 21 passages, of which the last is the first again
        (list(range(NGRAM)) * 3, -21 / 41),
        ([*range(NGRAM - 1), 99, *range(NGRAM - 1), 98], 0),  # shorter than a passage
    ],
)
def test_repetition(tokens: list[int], expected: float) -> None:
    assert repetition_term(rollout(tokens), RIGHT, None) == pytest.approx(expected)


@given(st.lists(st.integers(0, 1), max_size=200), st.integers(1, 200))
def test_terms_are_finite_and_between_minus_1_and_1(tokens: list[int], limit: int) -> None:
    values = {name: term(rollout(tokens[:limit]), RIGHT, limit) for name, term in SHAPING.items()}
    assert values["format"] in (0, 1)
    assert -1 <= values["overlong"] <= 0
    assert -1 < values["repetition"] <= 0


def test_groups_get_their_terms_and_scores_do_not_change() -> None:
    shaping = (("overlong", 0.5), ("repetition", 1.0), ("format", 0.1))
    record = PromptRecord("r", "problem", (), (), "5", "number", "toy", weight=2.0, shaping=shaping)
    group = RolloutGroup(record, (rollout(9), rollout([7] * 10, "5", "length")))
    with VerifierPool() as pool:
        [verified] = verify_groups(pool, [group], max_new_tokens=10)
        with pytest.raises(ValueError, match="limit"):
            verify_groups(pool, [group])
    assert verified.scores == [1, 0]
    assert [dict(verdict.shaping) for verdict in verified.verdicts] == [
        {"overlong": -0.5, "repetition": 0, "format": 1},
        {"overlong": -1, "repetition": 0, "format": 0},
    ]
    assert verified.rewards == pytest.approx([2 - 0.25 + 0.1, -0.5])
    assert verified.correctness == [2, 0]
