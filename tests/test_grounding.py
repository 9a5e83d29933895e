from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou

from spark_vl.records import BadRecordError, ImageSize
from spark_vl.verifiers import verify
from spark_vl.verifiers.base import boxed_gold, check_settings, get_verifier, run_verifier
from spark_vl.verifiers.boxes import MAX_CHARS, Shape, UnreadableError, find_answer, iou, read_shapes
from spark_vl.verifiers.detection import matching_size
from tests.conftest import make_image, make_record

SIZE, PROCESSED = (200, 100), (400, 400)  # twice as wide, four times as high
COORDINATES = ("resized", "thousand", "original")
RIGHT, WRONG, UNPARSABLE = (1.0, "ok"), (0.0, "ok"), (0.0, "unparsable")


def judge(kind: str, reply: str, gold: object, **options):
    """The verdict on `reply` in pixels of an image of 200×100, unless `options` say something else."""
    gold = gold if isinstance(gold, str) else json.dumps(gold)
    return verify(kind, reply, gold, **{"image_size": SIZE, "coordinates": "original", **options})


def grounded(kind: str, gold: str, **fields):
    return make_record("toy/7", "Where?", gold=gold, verifier=kind, **fields)


# ── where the answer is ──


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("[1, 2, 3, 4]", "[1, 2, 3, 4]"),
        (r"\boxed{ [1, 2, 3, 4] }", "[1, 2, 3, 4]"),
        (r'\boxed{{"bbox_2d": [1, 2, 3, 4]}}', '{"bbox_2d": [1, 2, 3, 4]}'),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]\n```', '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]'),
        ("```json\n[1]\n``` then \\boxed{[2]} then ```json\n[3]\n```", "[2]"),  # a box before a fence
        ("```json\n[1]\n``` no: ```json\n[2]\n``` of [3]", "[2]"),  # a fence before brackets; the last
        ("```json\n[1]\n```\n```python\n[2]\n```", "[1]"),  # only a fence that says json
        ("```\n[2]\n```", "[2]"),
        ("```json\n[1]\n``` and ```json\n[2", "[1]"),  # a fence that is cut off
        ("at [1, 2] or [3, 4].", "[3, 4]"),
        ("the car (left) is at [3, 4] (I think)", "[3, 4]"),
        ("[1, 2] to (3, 4)", "(3, 4)"),
        ("(3, 4) to [1, 2]", "[1, 2]"),
        ("[[1, 2], [3, 4]]", "[[1, 2], [3, 4]]"),
        ("[(1, 2), (3, 4)]", "[(1, 2), (3, 4)]"),
        ("from (1,2),(3,4) to (5, 6) ( 7.5 ,8 )!", "(5, 6) ( 7.5 ,8 )"),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>", "(1,2),(3,4)"),
        ('[1, 2] ] or [{"bbox_2d": [3, 4', "[1, 2]"),  # a stray bracket; brackets that do not close
        (r"\boxed{} [1, 2] \boxed{[3", "[1, 2]"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2', None),  # cut off
        ("```json\n[1, 2", None),
        ("[cut off (1, 2), (3, 4)", None),
        ("It is at 1, 2, 3, 4.", None),
        ("", None),
    ],
)
def test_find_answer(reply: str, answer: str | None) -> None:
    if answer is None:
        with pytest.raises(UnreadableError):
            find_answer(reply)
    else:
        assert find_answer(reply) == answer


BOX = [Shape((1, 2, 3, 4))]
CAT = [Shape((1, 2, 3, 4), "cat")]


@pytest.mark.parametrize(
    ("answer", "shapes"),
    [
        ("[1, 2, 3, 4]", BOX),
        ("[[1, 2, 3, 4]]", BOX),
        ("[1.0, 2e0, 3.000, 40e-1]", BOX),
        ("(1, 2), (3, 4)", BOX),
        ("(1,2)(3,4)", BOX),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', CAT),
        ('[{"label": "cat", "bbox_2d": [1, 2, 3, 4], "score": 0.9}]', CAT),
        ('{"bbox_2d": [1, 2, 3, 4], "label": null}', BOX),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}, [1, 2, 3, 4]]', CAT + BOX),
        ("(1,2),(3,4)\n(1,2),(3,4)", BOX * 2),
        ("[]", []),
    ],
)
def test_boxes_are_read(answer: str, shapes: list[Shape]) -> None:
    assert read_shapes(answer, "bbox_2d") == shapes


@pytest.mark.parametrize(
    ("answer", "shapes"),
    [
        ("[1, 2]", [Shape((1, 2))]),
        ("(1, 2)", [Shape((1, 2))]),
        ('{"point_2d": [1, 2], "label": "cat"}', [Shape((1, 2), "cat")]),
        ("[[1, 2], [3, 4]]", [Shape((1, 2)), Shape((3, 4))]),
        ("(1, 2), (3, 4)", [Shape((1, 2)), Shape((3, 4))]),
    ],
)
def test_points_are_read(answer: str, shapes: list[Shape]) -> None:
    assert read_shapes(answer, "point_2d") == shapes


BOXES = [
    r"\left[100, 99, 302, 198\right]",
    "100, 99, 302, 198",
    "(100, 99, 302, 198)",
    r"\left(100,\, 99,\, 302,\, 198\right)",
    "$[100, 99, 302, 198]$",
    r"[100,\ 99,\ 302,\ 198]",
    "[[100,99],[302,198]]",
    '"bbox_2d": [100, 99, 302, 198]',
    '{"bbox_2d": [[100, 99], [302, 198]]}',
    '${"bbox_2d": [100, 99, 302, 198], "label": "$5"}$',
]
POINTS = ["200, 149", "(200, 149)", r"\left(200,\ 149\right)", "$200, 149$", '{"coordinate": [200,149]}']


@pytest.mark.parametrize(
    ("kind", "answer"),
    [("iou", box) for box in BOXES] + [("detection", box) for box in BOXES] + [("point", point) for point in POINTS],
)
def test_spellings_of_a_box(kind: str, answer: str) -> None:
    for gold, score in (([100, 99, 302, 198], 1), ([0, 0, 90, 90], 0)):
        verdict = judge(kind, rf"\boxed{{{answer}}}", [gold] if kind == "detection" else gold, image_size=(400, 300))
        assert (verdict.score, verdict.status) == (score, "ok")


# ── scales, by hand ──


@pytest.mark.parametrize(
    ("coordinates", "reply"),
    [
        ("resized", "[40, 80, 120, 240]"),
        ("thousand", "[100, 200, 300, 600]"),
        ("original", "[20, 20, 60, 60]"),
    ],
)
def test_coordinates_are_scaled(coordinates: str, reply: str) -> None:
    sizes = {"image_size": SIZE, "processed_size": PROCESSED}
    for tried in COORDINATES:
        for kind, gold in (("iou", "[20, 20, 60, 60]"), ("detection", "[[20, 20, 60, 60]]")):
            verdict = verify(kind, reply, gold, coordinates=tried, threshold=0.99, **sizes)
            assert verdict.score == float(tried == coordinates), "no other system is tried"
    assert verify("iou", "[40, 80, 120, 240]", "[20, 20, 60, 60]", **sizes).score == 1, "resized is the default"


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_the_record_says_how_the_model_writes_and_a_recipe_can_ask_for_something_else(coordinates: str) -> None:
    replies = {"resized": "[40, 80, 120, 240]", "thousand": "[100, 200, 300, 600]", "original": "[20, 20, 60, 60]"}
    sizes, settings = (ImageSize(SIZE, PROCESSED),), {"threshold": 0.99}
    for written, reply in replies.items():
        record = grounded("iou", "[20, 20, 60, 60]", image_sizes=sizes, coordinates=coordinates)
        asked = replace(record, settings=(*settings.items(), ("coordinates", written)))
        record = replace(record, settings=tuple(settings.items()))
        assert get_verifier("iou")(reply, record).score == float(written == coordinates)
        assert get_verifier("iou")(reply, asked).score == 1


def test_a_point_is_scaled_too() -> None:
    for coordinates, reply in (("resized", "(80, 160)"), ("thousand", "(200, 400)"), ("original", "(40, 40)")):
        options = {"coordinates": coordinates, "processed_size": PROCESSED}
        assert judge("point", reply, [39, 39, 41, 41], **options).score == 1
        assert judge("point", reply, [40, 40], distance=0.0001, **options).score == 1


def test_the_image_is_chosen_by_its_index() -> None:
    record = grounded(
        "iou",
        "[20, 20, 60, 60]",
        settings=(("image", 1),),
        image_sizes=(ImageSize((10, 10), (10, 10)), ImageSize(SIZE, PROCESSED)),
        coordinates="resized",
    )
    assert get_verifier("iou")("[40, 80, 120, 240]", record).score == 1
    for index in (2, -1):
        with pytest.raises(BadRecordError, match=f"the size of image {index} is missing.*2 images"):
            get_verifier("iou")("[40, 80, 120, 240]", replace(record, settings=(("image", index),)))


# ── the three scores ──


@pytest.mark.parametrize(("threshold", "score"), [(0, 1 / 3), (1 / 3, 1), (0.34, 0), (0.5, 0)])
def test_iou_threshold(threshold: float, score: float) -> None:
    # 5×10 of 10×10 and 10×10 overlap: 50 of 150
    assert judge("iou", "[5, 0, 15, 10]", [0, 0, 10, 10], threshold=threshold).score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("[30, 40]", 1), ("[41, 40]", 1), ("[30, 51.1]", 1), ("[30, 51.3]", 0), ("[38, 48]", 0)],
)
def test_distance_is_a_share_of_the_diagonal(reply: str, score: float) -> None:
    assert judge("point", reply, "(30, 40)", distance=0.05).score == score  # 5 % of √(200² + 100²) is 11.18


@pytest.mark.parametrize(("reply", "score"), [("(10, 10)", 1), ("(20, 30)", 1), ("(20.1, 30)", 0), ("(9.9, 10)", 0)])
def test_a_point_in_a_box(reply: str, score: float) -> None:
    assert judge("point", reply, "(10, 10), (20, 30)").score == score


CATS = [
    {"bbox_2d": [0, 0, 10, 10], "label": "cat"},
    {"bbox_2d": [50, 50, 60, 60], "label": "Cat"},
    {"bbox_2d": [0, 0, 10, 10], "label": "hat"},
    [90, 90, 99, 99],
]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (CATS, 1),
        (CATS[::-1], 1),
        ([{"bbox_2d": [90, 90, 99, 99], "label": "anything"}, *CATS[:3]], 1),
        (CATS[:2], 2 * 2 / (2 + 4)),
        ([*CATS, [30, 30, 40, 40]], 2 * 4 / (5 + 4)),
        ([[0, 0, 10, 10], *CATS[1:]], 3 / 4),  # without the label
        ([{"bbox_2d": [0, 0, 10, 10], "label": "**CAT.**"}, *CATS[1:]], 1),
        ([{"bbox_2d": [0, 0, 10, 10], "label": "cats"}, *CATS[1:]], 3 / 4),
        ([CATS[0], CATS[0]], 2 * 1 / (2 + 4)),
        ([], 0),
    ],
)
def test_detection_is_f1(reply: object, score: float) -> None:
    assert judge("detection", json.dumps(reply), CATS).score == pytest.approx(score)


def test_nothing_to_detect() -> None:
    assert judge("detection", "There is none: []", []).score == 1
    assert judge("detection", "[[0, 0, 1, 1]]", []).score == 0
    assert judge("detection", "There is none.", []).status == "unparsable"


def test_greedy_pairing_would_lose_a_match() -> None:
    # the first box fits both, the second only the left of the gold, which the first is nearer to
    gold, reply = [[0, 0, 10, 10], [2, 0, 12, 10]], [[0.5, 0, 10.5, 10], [0, 0, 6, 10]]
    assert judge("detection", json.dumps(reply), gold).score == 1


# ── tricks ──

GOLD = [20, 20, 60, 60]
TWO = [[20, 20, 60, 60], [100, 20, 140, 60]]
GRID = [[x, y, x + 20, y + 20] for x in range(0, 200, 20) for y in range(0, 100, 20)]
FLOOD = [[x, y, x + 40, y + 40] for x in range(0, 160, 5) for y in range(0, 60, 5)]
BOMB = "[" * 30_000

HACKS = [  # kind, gold, reply, (score, status), what is tried
    ("iou", GOLD, "[0, 0, 200, 100]", WRONG, "the whole image"),
    ("iou", GOLD, f"{GRID}", WRONG, "a grid of boxes"),
    ("iou", GOLD, f"{FLOOD}", WRONG, "a flood of boxes, the gold among them"),
    ("iou", GOLD, "[[20, 20, 60, 60], [20, 20, 60, 60]]", WRONG, "the right box twice"),
    ("iou", GOLD, "[[20, 20, 60, 60], [0, 0, 1, 1]]", WRONG, "the right box and another"),
    ("iou", GOLD, r"\boxed{[20, 20, 60, 60] or [0, 0, 9, 9]}", UNPARSABLE, "A or B in a box"),
    ("iou", GOLD, "It is [20, 20, 60, 60] or [0, 0, 9, 9].", WRONG, "A or B in prose: the last is the answer"),
    ("iou", GOLD, "[20, 20, 60, 60]; as asked: [x1, y1, x2, y2]", UNPARSABLE, "the format of the prompt, echoed"),
    ("iou", GOLD, 'From the prompt: [20, 20, 60, 60]. ```json\n["none"]\n```', UNPARSABLE, "an echo before the answer"),
    ("iou", GOLD, r"[20, 20, 60, 60] \boxed{I don't know}", UNPARSABLE, "an echo before the answer"),
    ("iou", GOLD, "[]", WRONG, "no box"),
    ("iou", GOLD, "[{}]", UNPARSABLE, "no box"),
    ("iou", GOLD, '{"bbox_2d": []}', UNPARSABLE, "no box"),
    ("iou", GOLD, "[60, 60, 20, 20]", UNPARSABLE, "both corners swapped: a positive product of two negative sides"),
    ("iou", GOLD, "[60, 20, 20, 60]", UNPARSABLE, "left and right swapped"),
    ("iou", GOLD, "[20, 20, 20, 60]", UNPARSABLE, "no width"),
    ("iou", GOLD, "[20, 20, 20.0000000000000001, 60]", UNPARSABLE, "no width, in a computer's numbers"),
    ("iou", GOLD, "[0, 0, 5e-324, 5e-324]", UNPARSABLE, "an area that is rounded to 0"),
    ("iou", GOLD, "[NaN, NaN, NaN, NaN]", UNPARSABLE, "not a number"),
    ("iou", GOLD, "[20, 20, NaN, 60]", UNPARSABLE, "not a number"),
    ("iou", GOLD, "[0, 0, Infinity, Infinity]", UNPARSABLE, "infinity"),
    ("iou", GOLD, "[-Infinity, -Infinity, Infinity, Infinity]", UNPARSABLE, "infinity"),
    ("iou", GOLD, "[-1e308, -1e308, 1e308, 1e308]", UNPARSABLE, "an area that overflows"),
    ("iou", GOLD, "[20, 20, 1e999, 60]", UNPARSABLE, "a number that overflows"),
    ("iou", GOLD, f"[20, 20, {'9' * 5000}, 60]", UNPARSABLE, "an integer longer than Python reads"),
    ("iou", GOLD, "[-40, 20, 60, 60]", UNPARSABLE, "outside the image"),
    ("iou", [0, 20, 60, 60], "[-5, 20, 60, 60]", RIGHT, "no trick: a little outside is moved to the border"),
    ("iou", GOLD, "[201, 20, 205, 60]", UNPARSABLE, "nothing is left inside the image"),
    ("iou", GOLD, "[100, 200, 300, 600]", UNPARSABLE, "thousandths, where pixels are asked for"),
    ("iou", GOLD, "[0.1, 0.2, 0.3, 0.6]", WRONG, "shares of the sides, where pixels are asked for"),
    ("iou", GOLD, "[20, 20, 40, 40]", WRONG, "width and height, where corners are asked for"),
    ("iou", GOLD, '["20", "20", "60", "60"]', UNPARSABLE, "numbers in quotes"),
    ("iou", GOLD, '{"bbox_2d": "[20, 20, 60, 60]"}', UNPARSABLE, "a box in quotes"),
    ("iou", GOLD, "[２０, ２０, ６０, ６０]", UNPARSABLE, "full-width digits"),
    ("iou", GOLD, "(٢٠, ٢٠), (٦٠, ٦٠)", UNPARSABLE, "Arabic digits"),
    ("iou", GOLD, "[true, 20, 60, 60]", UNPARSABLE, "true is no 1"),
    ("iou", GOLD, "[20, 20, 60]", UNPARSABLE, "three numbers"),
    ("iou", GOLD, "[20, 20, 60, 60, 0.9]", UNPARSABLE, "five numbers"),
    ("iou", GOLD, "[[20, 20], [60, 60]]", RIGHT, "no trick: two corners"),
    ("iou", GOLD, "[[20, 20], [60, 60], [20, 20], [60, 60]]", UNPARSABLE, "a list of points"),
    ("iou", GOLD, r"\boxed{20, 20, 60, 60, 20, 20, 60, 60}", UNPARSABLE, "two boxes without brackets"),
    ("iou", GOLD, r"\boxed{20 20 60 60}", UNPARSABLE, "numbers without commas"),
    ("iou", GOLD, r"\boxed{20, 20, 60, 60 or 0, 0, 9, 9}", UNPARSABLE, "A or B without brackets"),
    ("iou", GOLD, r"\boxed{(20, 20, 60, 60}", UNPARSABLE, "a parenthesis that does not close"),
    ("iou", GOLD, r"\boxed{2\,0, 20, 60, 60}", UNPARSABLE, "a space within a number"),
    ("iou", GOLD, r'\boxed{"bbox_2d": [20, 20, 60, 60], "bbox_2d": [0, 0, 9, 9]}', UNPARSABLE, "a key given twice"),
    ("iou", GOLD, '{"coordinate": [20, 20, 60, 60]}', UNPARSABLE, "the key of a point"),
    ("iou", GOLD, "[[[20, 20, 60, 60]]]", UNPARSABLE, "nested too deep"),
    ("iou", GOLD, "[20, 20, 60, 60,]", UNPARSABLE, "not JSON"),
    ("iou", GOLD, "[20, 20, 60, 60 /* or 90 */]", UNPARSABLE, "JSON with a comment"),
    ("iou", GOLD, "[10+10, 20, 60, 60]", UNPARSABLE, "arithmetic"),
    ("iou", GOLD, "[__import__('time').sleep(9), 20, 60, 60]", UNPARSABLE, "code"),
    ("iou", GOLD, '{"bbox_2d": [0, 0, 9, 9], "bbox_2d": [20, 20, 60, 60]}', UNPARSABLE, "a key given twice"),
    ("iou", GOLD, '{"point_2d": [20, 20, 60, 60]}', UNPARSABLE, "another key"),
    ("iou", GOLD, '{"bbox_2d": [20, 20, 60, 60], "label": ["a", "b"]}', UNPARSABLE, "two labels"),
    ("iou", GOLD, '[{"bbox_2d": [20, 20, 60, 60]}, {"bbox_2d": [20, 20', UNPARSABLE, "cut off"),
    ("iou", GOLD, BOMB, UNPARSABLE, "brackets without end"),
    ("iou", GOLD, BOMB + "]" * len(BOMB), UNPARSABLE, "brackets too deep to read"),
    ("iou", GOLD, '{"bbox_2d":' * 5000 + "[20, 20, 60, 60]" + "}" * 5000, UNPARSABLE, "objects too deep to read"),
    ("point", GOLD, "[[40, 40], [150, 90]]", WRONG, "two points"),
    ("point", GOLD, "(40, 40), (150, 90)", WRONG, "two points"),
    ("point", GOLD, r"\boxed{40, 40, 150, 90}", UNPARSABLE, "two points without brackets"),
    ("point", GOLD, '{"coordinate": [40, 40], "point_2d": [150, 90]}', UNPARSABLE, "two points under two keys"),
    ("point", GOLD, "[20, 20, 60, 60]", UNPARSABLE, "the gold itself, which is a box"),
    ("point", GOLD, '{"bbox_2d": [20, 20, 60, 60]}', UNPARSABLE, "the gold itself, which is a box"),
    ("point", GOLD, "[NaN, 40]", UNPARSABLE, "not a number"),
    ("point", GOLD, "[1e308, 40]", UNPARSABLE, "outside the image"),
    ("point", GOLD, f"{[[x, 40] for x in range(200)]}", WRONG, "a line of points"),
    ("detection", TWO, "[[0, 0, 200, 100]]", WRONG, "the whole image"),
    ("detection", TWO, f"{TWO + TWO}", (2 * 2 / 6, "ok"), "every box twice"),
    ("detection", TWO, f"{[TWO[0]] * 100}", (2 * 1 / 102, "ok"), "one box a hundred times"),
    ("detection", TWO, f"{FLOOD}", (2 * 2 / 386, "ok"), "a flood of boxes, the gold among them"),
    ("detection", TWO, f"{GRID}", WRONG, "a grid of boxes"),
    ("detection", TWO, f"{TWO * 501}", UNPARSABLE, "1002 boxes"),
    ("detection", TWO, "[[20, 20, 60, 60], [140, 60, 100, 20]]", UNPARSABLE, "one of the boxes has swapped corners"),
    ("detection", TWO, "[[20, 20, 60, 60], [NaN, 0, 1, 1]]", UNPARSABLE, "one of the boxes is none"),
    ("detection", [], "", UNPARSABLE, "silence, where nothing is to be found"),
    ("detection", TWO, "[]", WRONG, "nothing, where there is something"),
    ("detection", CATS[:1], '{"bbox_2d": [0, 0, 10, 10], "label": "cat or dog"}', WRONG, "two labels in one"),
    ("detection", CATS[:1], '{"bbox_2d": [0, 0, 10, 10], "label": ""}', WRONG, "a blank label"),
]


@pytest.mark.parametrize(
    ("kind", "gold", "reply", "expected", "trick"), HACKS, ids=[f"{h[0]}-{i}-{h[-1]}" for i, h in enumerate(HACKS)]
)
def test_tricks_do_not_pay(kind, gold, reply, expected, trick) -> None:
    verdict = judge(kind, reply, gold)
    assert (verdict.score, verdict.status) == (pytest.approx(expected[0]), expected[1]), trick
    assert (verdict.parsed is None) == (verdict.status == "unparsable") == bool(verdict.detail)


LONG = 100_000


@pytest.mark.parametrize(
    "reply",
    [
        "[" * LONG,
        "[" * (LONG // 2) + "]" * (LONG // 2),
        "{" * LONG,
        "(" * LONG,
        "(1," * (LONG // 3),
        "(" + "1" * LONG,
        "(1,1) " * (LONG // 6),
        "(1,1" + " " * LONG,
        "```json" * (LONG // 7),
        "```json [1, 2, 3, " * (LONG // 18),
        '{"bbox_2d":' * (LONG // 11),
        "\\boxed{" * (LONG // 7),
        "[" + "1" * LONG + "]",
        "[" + "[1, 2, 3, 4], " * (LONG // 14) + "[1, 2, 3, 4]]",
        '"' * LONG,
        '[{"label": "' + "a" * LONG + '", "bbox_2d": [20, 20, 60, 60]}]',
    ],
    ids=lambda reply: reply[:12],
)
def test_long_replies_are_no_answers_and_take_no_time(reply: str) -> None:
    started = time.perf_counter()
    for kind in ("iou", "point", "detection"):
        gold = [20, 20, 60, 60] if kind != "detection" else [[20, 20, 60, 60]]
        assert judge(kind, reply, gold).status == "unparsable"
    assert time.perf_counter() - started < 3


def test_the_most_boxes_that_are_read_are_matched_in_time() -> None:
    gold = [[i / 100, 0, 100 + i / 100, 100] for i in range(1000)]  # nearly all fit nearly all
    reply = json.dumps(gold)
    assert len(reply) < MAX_CHARS
    started = time.perf_counter()
    assert judge("detection", reply, gold).score == 1
    assert matching_size([range(500)] * 1000) == 500
    assert time.perf_counter() - started < 10


# ── records ──


@pytest.mark.parametrize(
    ("kind", "gold"),
    [
        ("iou", ""),
        ("iou", "[1, 2, 3]"),
        ("iou", "[20, 20, 10, 10]"),
        ("iou", "[0, 0, 300, 50]"),
        ("iou", "[NaN, 0, 1, 1]"),
        ("iou", "[]"),
        ("iou", json.dumps(TWO)),
        ("iou", "[1, 2]"),
        ("point", "[500, 2]"),
        ("point", "[[1, 2], [3, 4]]"),
        ("point", "[20, 20, 10, 10]"),
        ("point", "[]"),
        ("point", "[10, 10]"),  # without a distance
        ("detection", "cat"),
        ("detection", "[[20, 20, 10, 10]]"),
        ("detection", r"\boxed{}"),
    ],
)
def test_a_gold_that_means_nothing_is_a_bad_record(kind: str, gold: str) -> None:
    record = grounded(kind, gold, image_sizes=(ImageSize(SIZE, PROCESSED),), coordinates="resized")
    for reply in ("[1, 2, 3, 4]", "nothing"):
        with pytest.raises(BadRecordError, match=r"^toy/7: gold"):
            get_verifier(kind)(reply, record)
        assert run_verifier(reply, record).status == "error"


@pytest.mark.parametrize(
    ("kind", "gold", "options"),
    [
        ("iou", "[0.1, 0.2, 0.5, 0.6]", {}),
        ("iou", "[0, 0, 1, 1]", {}),
        ("iou", "[0.1, 0.2, 0.5, 0.6]", {"gold_boxes": "xywh"}),
        ("point", "[0.1, 0.2, 0.5, 0.6]", {}),
        ("point", "[0.1, 0.2]", {"distance": 0.1}),
        ("detection", "[[20, 20, 60, 60], [0.1, 0.2, 0.5, 0.6]]", {}),
    ],
)
def test_a_gold_in_shares_of_the_image_is_a_bad_record(kind: str, gold: str, options: dict) -> None:
    with pytest.raises(BadRecordError, match=r"looks normalized.*allowed: pixels of the original image, 200×100"):
        judge(kind, "[1, 2, 3, 4]", gold, **options)


def test_a_small_gold_is_no_share() -> None:
    assert judge("iou", "[0, 0, 2, 1]", [0, 0, 2, 1]).score == 1
    assert judge("iou", "[0, 0, 1, 1]", [0, 0, 2, 1], threshold=0.6).score == 0


@pytest.mark.parametrize("kind", ["iou", "point", "detection"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_without_a_size_nothing_is_guessed(kind: str, coordinates: str) -> None:
    record = grounded(kind, "[1, 2, 3, 4]", settings=(("coordinates", coordinates),))
    with pytest.raises(BadRecordError, match=rf"^toy/7: the size of image 0 is missing, which {kind} needs"):
        get_verifier(kind)("[1, 2, 3, 4]", record)


@pytest.mark.parametrize("kind", ["iou", "point", "detection"])
def test_of_a_record_that_no_model_has_been_asked_no_coordinates_are_guessed(kind: str) -> None:
    record = grounded(kind, "[1, 2, 3, 4]", image_sizes=(ImageSize(SIZE, PROCESSED),))
    with pytest.raises(BadRecordError, match=rf"^toy/7: how coordinates are written is missing, which {kind} needs"):
        get_verifier(kind)("[1, 2, 3, 4]", record)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("iou", {"threshold": 1.5}, "threshold is 1.5"),
        ("iou", {"threshold": -0.1}, "threshold: found -0.1; allowed: a finite number from 0"),
        ("iou", {"threshold": float("nan")}, "threshold: found nan; allowed: a finite number"),
        ("iou", {"threshold": "0.5"}, "threshold: found '0.5'"),
        ("iou", {"distance": 0.1}, "'distance' is not a setting; allowed: image, coordinates, gold_boxes, threshold"),
        ("iou", {"coordinates": "pixels"}, "'model', 'resized', 'thousand', 'original'"),
        ("iou", {"image": 1}, "the size of image 1 is missing"),
        ("iou", {"image": True}, "image: found True"),
        ("iou", {"treshold": 0.5}, "'treshold' is not a setting"),
        (
            "point",
            {"threshold": 0.5},
            "'threshold' is not a setting; allowed: image, coordinates, gold_boxes, distance",
        ),
        ("point", {"distance": 5}, "distance is 5"),
        ("detection", {"threshold": 0}, "threshold is 0; detection"),
        ("detection", {"distance": 0.1}, "'distance' is not a setting"),
    ],
)
def test_wrong_settings(kind: str, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(kind, "[1, 2, 3, 4]", [1, 2, 3, 4], **wrong)


def test_settings_of_a_recipe() -> None:
    check_settings("iou", {"image": 1, "coordinates": "thousand", "threshold": 1})
    check_settings("point", {"distance": 0.02})


# ── against independent truth ──

numbers = st.integers(0, 1000).map(lambda n: n / 10)
boxes = st.tuples(numbers, numbers, numbers, numbers).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 1.1, max(b[1], b[3]) + 1.1)
)
few_boxes = st.lists(boxes, min_size=1, max_size=6)


def test_iou_is_that_of_torchvision() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (2, 300, 2, 2))
    a, b = (torch.tensor(np.sort(c, axis=1).reshape(-1, 4)) for c in corners)
    expected = box_iou(a, b)
    found = [[iou(tuple(x), tuple(y)) for y in b.tolist()] for x in a.tolist()]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-12, atol=0)
    assert (expected > 0).float().mean() > 0.2


@pytest.mark.parametrize("kind", ["iou", "point", "detection"])
def test_golds_with_width_and_height_are_those_of_torchvision(kind: str) -> None:
    corners = [20.0, 10.0, 80.0, 40.0]
    written = box_convert(torch.tensor(corners), "xyxy", "xywh").tolist()
    reply = [50, 25] if kind == "point" else corners
    assert judge(kind, json.dumps(reply), written, gold_boxes="xywh").score == 1
    assert judge(kind, json.dumps([90, 45] if kind == "point" else written), written, gold_boxes="xywh").score == 0
    gold = grounded(
        kind,
        json.dumps(written),
        settings=(("gold_boxes", "xywh"), ("coordinates", "thousand")),
        image_sizes=(ImageSize(SIZE, PROCESSED),),
    )
    in_thousandths = [250, 250] if kind == "point" else [100, 100, 400, 400]
    expected = [in_thousandths] if kind == "detection" else in_thousandths
    assert json.loads(boxed_gold(gold).removeprefix(r"\boxed{")[:-1]) == expected
    with pytest.raises(BadRecordError, match="outside the image"):
        judge(kind, "[1, 2, 3, 4]", [20, 10, 200, 10], gold_boxes="xywh")


@given(boxes, boxes)
def test_iou_properties(a, b) -> None:
    value = iou(a, b)
    assert 0 <= value <= 1
    assert value == iou(b, a)
    assert iou(a, a) == 1
    assert (value == 1) == (a == b)


@given(st.lists(st.lists(st.integers(0, 6), unique=True, max_size=7), max_size=7))
@settings(deadline=None, max_examples=300)
def test_matching_is_that_of_scipy(fitting: list[list[int]]) -> None:
    cost = np.zeros((len(fitting), 7))
    for i, fits in enumerate(fitting):
        cost[i, fits] = 1
    rows, columns = linear_sum_assignment(cost, maximize=True)
    assert matching_size(fitting) == cost[rows, columns].sum()


def test_matching_of_larger_graphs_is_that_of_scipy() -> None:
    rng = random.Random(0)
    for share in (0.01, 0.02, 0.05, 0.5):
        fitting = [[j for j in range(120) if rng.random() < share] for _ in range(100)]
        cost = np.array([[j in fits for j in range(120)] for fits in fitting], dtype=float)
        rows, columns = linear_sum_assignment(cost, maximize=True)
        assert matching_size(fitting) == cost[rows, columns].sum()


@given(few_boxes, few_boxes, st.sampled_from([0.1, 0.3, 0.5, 0.75]))
@settings(deadline=None)
def test_f1_is_that_of_the_best_permutation(gold, reply, threshold: float) -> None:
    fits = (box_iou(torch.tensor(gold).double(), torch.tensor(reply).double()) >= threshold - 1e-9).tolist()
    size = max(len(gold), len(reply))
    matched = max(
        sum(fits[i][j] for i, j in enumerate(order) if i < len(gold) and j < len(reply))
        for order in permutations(range(size))
    )
    verdict = judge("detection", json.dumps(reply), gold, threshold=threshold, image_size=(102, 102))
    assert verdict.score == pytest.approx(2 * matched / (len(gold) + len(reply)))


sides = st.integers(28, 3000)


@given(
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.lists(st.tuples(*[st.floats(0, 0.9), st.floats(0.08, 0.1)] * 2), min_size=1, max_size=5),
    st.sampled_from(COORDINATES),
)
@settings(deadline=None)
def test_the_gold_scores_1_in_every_system(original, processed, shares, coordinates) -> None:
    width, height = original
    gold = [[x * width, y * height, (x + w) * width, (y + h) * height] for x, w, y, h in shares]
    center = [(gold[0][0] + gold[0][2]) / 2, (gold[0][1] + gold[0][3]) / 2]
    labeled = [{"bbox_2d": box, "label": "a {" if i else "b"} for i, box in enumerate(gold)]
    for kind, answer, values in (
        ("iou", gold[0], {"threshold": 0}),
        ("iou", gold[0], {"threshold": 1}),
        ("point", gold[0], {}),
        ("point", center, {"distance": 1e-6}),
        ("detection", gold, {"threshold": 1}),
        ("detection", labeled[:1], {}),
        ("detection", [], {}),
    ):
        record = grounded(
            kind,
            json.dumps(answer),
            settings=(("coordinates", coordinates), *values.items()),
            image_sizes=(ImageSize(original, processed),),
        )
        assert get_verifier(kind)(boxed_gold(record), record).score == 1


@given(
    st.lists(
        st.sampled_from(
            [*'[]{}(),:"\\ 19.-', "```", "json", "bbox_2d", "point_2d", "label", "\\boxed{", "NaN", "5, 5"]
        ),
        max_size=25,
    ).map("".join),
    st.sampled_from(["iou", "point", "detection"]),
)
@settings(deadline=None, max_examples=500)
def test_any_reply_gets_a_score(reply: str, kind: str) -> None:
    verdict = judge(kind, reply, [5, 5, 19, 19], image_size=(20, 20))
    assert 0 <= verdict.score <= 1
    assert (verdict.parsed is None) == (verdict.status == "unparsable")


# ── with the processor ──


def test_a_processed_record_is_scored_in_pixels_of_the_resized_image(processor) -> None:
    record = make_record("toy/7", make_image(0, (100, 60)), "Where?", gold="[10, 12, 50, 48]", verifier="iou")
    record = replace(record, settings=(("threshold", 0.0),))
    prompt = processor.process(record).record
    (width, height), size = prompt.image_sizes[0].processed, prompt.image_sizes[0].original
    assert size == (100, 60)
    assert (width / 100, height / 60) not in ((1, 1), (width / 100, width / 100)), "the ratio changes, as 28 has it"
    x, y = width / 100, height / 60
    scaled = f'```json\n[{{"bbox_2d": [{10 * x}, {12 * y}, {50 * x}, {48 * y}], "label": "noise"}}]\n```'
    assert get_verifier("iou")(scaled, prompt).score == 1
    assert get_verifier("iou")(boxed_gold(prompt), prompt).score == 1
    assert get_verifier("iou")("[10, 12, 50, 48]", prompt).score < 1, "pixels of the original"
