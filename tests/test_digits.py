"""The digits against scikit-learn's own labels and pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from spark_vl.demo import digits

SAMPLE = 300


@pytest.fixture(scope="module")
def problems():
    return {split: [digits.problem(split, i) for i in range(min(SAMPLE, n))] for split, n in digits.SPLITS.items()}


def test_answers_follow_from_the_labels_of_the_instances(problems):
    target = load_digits().target
    asked = set()
    for row in (row for rows in problems.values() for row in rows):
        left, right = (int(target[i]) for i in row.instances)
        right_answer = {
            "Which digit is larger?": max(left, right),
            "Which digit is smaller?": min(left, right),
            "By how much do the digits differ?": abs(left - right),
        }[row.question]
        assert row.digits == (left, right)
        assert row.answer == str(right_answer)
        asked.add(row.question)
    assert asked == set(digits.QUESTIONS)


def test_no_instance_is_in_two_splits(problems):
    drawn = {split: {i for row in rows for i in row.instances} for split, rows in problems.items()}
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    ranges = [range(*bounds) for bounds in digits._INSTANCES.values()]
    assert sorted(i for r in ranges for i in r) == list(range(1797)), "each instance is in one split"
    assert len(ranges[-1]) == 497


def test_the_left_half_shows_the_left_instance(problems):
    images = load_digits().images
    for row in problems["test"][:50]:
        image = Image.open(io.BytesIO(row.image))
        assert (image.format, image.size) == ("PNG", (56, 56))
        for half, instance in zip(np.hsplit(np.asarray(image, float), 2), row.instances, strict=True):
            rows, shown = half.mean(1), images[instance]
            tops = range(len(rows) - 28 + 1)
            top = max(tops, key=lambda t: rows[t : t + 28].sum())
            small = np.asarray(Image.fromarray(half[top : top + 28]).resize((8, 8), Image.Resampling.BOX))
            best = max(np.corrcoef(np.roll(small, shift, 0).ravel(), shown.ravel())[0, 1] for shift in (-1, 0, 1))
            assert best > 0.8


@pytest.mark.parametrize("split", digits.SPLITS)
def test_rows_are_a_deterministic_sequence(split):
    rows = digits.rows(split)
    assert len(rows) == digits.SPLITS[split]
    first, last = rows[0], rows[len(rows) - 1]
    assert set(first) == {"id", "question", "answer", "image"}
    assert (first, last) == (digits.rows(split)[0], rows[-1])
    assert first["id"] != last["id"]
    assert first["image"]["bytes"] != last["image"]["bytes"]
    assert first["image"]["bytes"] == digits.problem(split, 0).image
    with pytest.raises(IndexError, match=str(len(rows))):
        rows[len(rows)]


def test_an_unknown_split_names_those_that_exist():
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        digits.rows("dev")
