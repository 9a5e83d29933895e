from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_vl.records import PromptRecord, Rollout, RolloutGroup
from spark_vl.verifiers import VerifierPool, verify_groups
from spark_vl.verifiers.shaping import NGRAM, SHAPING, format_term, overlong_term, repetition_term


def rollout(tokens: int | list[int], text: str = r"\boxed{5}", finish: str = "stop") -> Rollout:
    ids = tuple(range(tokens)) if isinstance(tokens, int) else tuple(tokens)
    return Rollout(ids, (-0.5,) * len(ids), text, finish)


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [(r"\boxed{5}", "stop", 1), (r"\boxed{5}", "length", 0), ("5", "stop", 0), (r"\boxed{}", "stop", 0)],
)
def test_format(text: str, finish: str, expected: float) -> None:
    assert format_term(rollout(3, text, finish), None) == expected


@pytest.mark.parametrize(  # the limit is 20480, the length that is expected 16384: the run of the paper
    ("tokens", "expected"),
    [(1, 0), (16384, 0), (16385, -1 / 4096), (17408, -0.25), (18432, -0.5), (20479, -4095 / 4096), (20480, -1)],
)
def test_overlong_is_equation_13_of_dapo(tokens: int, expected: float) -> None:
    assert overlong_term(rollout(tokens), 20480) == pytest.approx(expected, abs=1e-12)


def test_overlong_of_a_small_limit() -> None:
    assert [overlong_term(rollout(n), 10) for n in (0, 8, 9, 10)] == [0, 0, -0.5, -1]
    assert [overlong_term(rollout(n), 1) for n in (0, 1)] == pytest.approx([0, -1])


def test_overlong_needs_the_limit() -> None:
    with pytest.raises(ValueError, match="overlong needs the limit on new tokens"):
        overlong_term(rollout(5), None)


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
    assert repetition_term(rollout(tokens), None) == pytest.approx(expected)


@given(st.lists(st.integers(0, 1), max_size=200), st.integers(1, 200))
def test_terms_are_finite_and_between_minus_1_and_1(tokens: list[int], limit: int) -> None:
    values = {name: term(rollout(tokens[:limit]), limit) for name, term in SHAPING.items()}
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
