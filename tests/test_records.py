"""The nouns: what they refuse, what they compute, and that records survive JSON."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_vl.records import (
    JUDGMENTS,
    KINDS,
    BadRecordError,
    ImageRef,
    ImageSize,
    Message,
    Origin,
    PromptRecord,
    RecycledRecord,
    Rollout,
    RolloutGroup,
    Verdict,
    plain_text,
)
from spark_vl.run.codec import group_from_json, group_to_json, record_from_json, record_to_json
from spark_vl.verifiers import VERIFIERS
from tests.conftest import make_image, make_record

images = st.builds(ImageRef, data=st.binary()) | st.builds(ImageRef, path=st.text(), root=st.text())
contents = st.lists(st.text() | images).map(tuple)
messages = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=contents)
origins = st.builds(
    Origin,
    parent_id=st.text(),
    step=st.integers(0),
    template=st.text(),
    rollouts=st.lists(st.integers(0)).map(tuple),
    quoted_correct=st.none() | st.booleans(),
    completions=st.lists(st.text()).map(tuple),
)
sides = st.tuples(st.integers(1), st.integers(1))
numbers = st.floats(allow_nan=False)
fields_of_all = {
    "id": st.text(),
    "messages": st.lists(messages).map(tuple),
    "question": contents,
    "gold": st.text(),
    # The settings below are no shipped verifier's.
    "verifier": st.text().filter(lambda name: name not in VERIFIERS),
    "recipe": st.text(),
    "choices": st.lists(st.text()).map(tuple),
    "settings": st.dictionaries(st.text(), st.text() | st.integers() | numbers).map(lambda d: tuple(d.items())),
    "weight": numbers,
    "shaping": st.dictionaries(st.text(), numbers).map(lambda d: tuple(d.items())),
    "image_sizes": st.lists(st.builds(ImageSize, original=sides, processed=sides)).map(tuple),
    "license": st.text(),
}
problems = st.builds(PromptRecord, kind=st.just("problem"), **fields_of_all)
recycled = st.builds(RecycledRecord, kind=st.sampled_from(KINDS[1:]), origin=origins, **fields_of_all)
verdicts = st.builds(
    Verdict,
    score=numbers,
    parsed=st.none() | st.text(),
    status=st.sampled_from(["ok", "unparsable", "timeout", "error"]),
    detail=st.text(),
    shaping=st.dictionaries(st.text(), numbers).map(lambda d: tuple(d.items())),
)
rollouts = st.builds(
    Rollout,
    token_ids=st.lists(st.integers(0), min_size=1).map(tuple),
    logprobs=st.lists(numbers).map(tuple),
    text=st.text(),
    finish_reason=st.sampled_from(["stop", "length"]),
) | st.builds(Rollout, token_ids=st.just(()), logprobs=st.just(()), text=st.text(), finish_reason=st.just("stop"))


@given(record=problems | recycled)
def test_a_record_survives_json(record):
    text = json.dumps(record_to_json(record))
    assert record_from_json(json.loads(text), {record.verifier}) == record


@given(record=problems | recycled, pairs=st.lists(st.tuples(rollouts, verdicts), max_size=3))
def test_a_verified_group_survives_json(record, pairs):
    group = RolloutGroup(record, tuple(r for r, _ in pairs), tuple(v for _, v in pairs))
    stored = json.loads(json.dumps(group_to_json(group)))
    assert group_from_json(stored, {record.verifier}) == group


def test_only_a_recycled_record_has_an_origin_and_the_kind_says_which_it_is():
    """Both directions: a problem that is recycled, and a judgment of nothing, cannot be made."""
    problem, judgment = make_record("p", "?"), make_record("p@3#pointwise", "?", kind="pointwise")
    assert (type(problem), type(judgment)) == (PromptRecord, RecycledRecord)
    assert (problem.parent_id, judgment.parent_id) == ("p", judgment.origin.parent_id)
    with pytest.raises(TypeError, match="origin"):
        PromptRecord(**vars(problem) | {"origin": judgment.origin})
    with pytest.raises(TypeError, match="origin"):
        RecycledRecord(**vars(problem) | {"kind": "pairwise"})
    for kind in KINDS[1:]:
        with pytest.raises(ValueError, match=f"p: a PromptRecord is of kind '{kind}'; allowed: 'problem'"):
            replace(problem, kind=kind)
        assert replace(judgment, kind=kind).origin == judgment.origin
    with pytest.raises(ValueError, match="a RecycledRecord is of kind 'problem'; allowed: 'pointwise' or 'pairwise'"):
        replace(judgment, kind="problem")


def test_a_record_as_json_is_what_a_checkpoint_holds():
    origin = Origin("digits/7", 3, "yes_no", (2,), True, (r"So \boxed{7}",))
    record = make_record("digits/7@3#pointwise", ImageRef(data=b"\x89P"), "Right?", gold="Yes", kind="pointwise")
    record = replace(record, choices=("Yes", "No"), origin=origin, question=(ImageRef("a.png", "/data"), "Larger?"))
    record = replace(record, image_sizes=(ImageSize((640, 480), (644, 476)),), coordinates="resized")
    record = replace(record, settings=(("relative", 0.05),), weight=0.9, shaping=(("format", 0.1),), license="MIT")
    record = replace(record, tags=(("version", "Text Lite"),))
    assert record_from_json(record_to_json(record)) == record
    assert record_to_json(record) == {
        "id": "digits/7@3#pointwise",
        "kind": "pointwise",
        "messages": [{"role": "user", "content": [{"data": "iVA="}, "Right?"]}],
        "question": [{"path": "a.png", "root": "/data"}, "Larger?"],
        "gold": "Yes",
        "verifier": "number",
        "recipe": "test",
        "choices": ["Yes", "No"],
        "settings": {"relative": 0.05},
        "weight": 0.9,
        "shaping": {"format": 0.1},
        "license": "MIT",
        "tags": {"version": "Text Lite"},
        "image_sizes": [{"original": [640, 480], "processed": [644, 476]}],
        "coordinates": "resized",
        "origin": {
            "parent_id": "digits/7",
            "step": 3,
            "template": "yes_no",
            "rollouts": [2],
            "quoted_correct": True,
            "completions": [r"So \boxed{7}"],
            "pair": "",
        },
    }
    assert record_to_json(record).keys() == {field.name for field in fields(RecycledRecord)}
    problem = make_record("digits/7", "?")
    assert record_to_json(problem).keys() == {field.name for field in fields(PromptRecord)}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"path": "a.png"},
        {"root": "/data"},
        {"data": b"x", "path": "a.png"},
        {"data": b"x", "root": "/data"},
        {"data": b"x", "path": "a.png", "root": "/data"},
    ],
)
def test_an_image_is_either_bytes_or_a_path_below_a_root(wrong):
    with pytest.raises(ValueError, match="an ImageRef holds either data, or path and root"):
        ImageRef(**wrong)


def test_equal_images_are_one_key_and_bytes_are_not_printed():
    assert len({ImageRef(data=b"x" * 1000), ImageRef(data=b"x" * 1000), ImageRef("a", "/r"), ImageRef("a", "/q")}) == 3
    assert repr(ImageRef(data=b"x" * 1000)) == "ImageRef(1000 bytes)"
    assert repr(ImageRef(data=b"")) == "ImageRef(0 bytes)"
    assert repr(ImageRef("a.png", "/data")) == "ImageRef('a.png')"
    assert repr(ImageRef("", "/data")) == "ImageRef('')"


def test_images_and_text_come_in_reading_order():
    one, two, three = (make_image(seed) for seed in range(3))
    record = PromptRecord(
        id="r",
        kind="problem",
        messages=(Message("system", (one, "look")), Message("user", ("a", two, "b", one, three))),
        question=("a", two),
        gold="",
        verifier="math",
        recipe="test",
    )
    assert record.images == (one, two, one, three)
    assert plain_text(record.messages[1].content) == "a<image>b<image><image>"
    assert make_record("none", "text").images == ()


def test_records_are_values():
    record = make_record("r", make_image(0), "text")
    assert record == make_record("r", make_image(0), "text")
    assert hash(record) == hash(make_record("r", make_image(0), "text"))
    with pytest.raises(FrozenInstanceError):
        record.gold = "6"


def make_group(*scores: float) -> RolloutGroup:
    rollouts = tuple(Rollout((i,), (-1.0,), str(i), "stop") for i in range(len(scores)))
    return RolloutGroup(make_record("r", "text"), rollouts, tuple(Verdict(score, "5") for score in scores))


def test_a_group_is_verified_by_as_many_verdicts_as_it_has_rollouts():
    group = replace(make_group(0, 1), verdicts=())
    verdicts = (Verdict(1.0, "5"), Verdict(0.0, None, "unparsable"))
    verified = group.verified(verdicts)
    assert verified == replace(group, verdicts=verdicts)
    assert verified.rewards == verified.correctness == [1, 0]
    assert group.verdicts == (), "the group itself is left as it is"
    for wrong in ((), verdicts[:1], verdicts * 2):
        with pytest.raises(ValueError, match=f"r: {len(wrong)} verdicts for 2 rollouts"):
            group.verified(wrong)


@pytest.mark.parametrize(
    ("scores", "zero_variance"), [((), True), ((0.5,), True), ((1, 1, 1), True), ((0, 0, 1), False), ((0, 0.1), False)]
)
def test_a_group_without_variance_is_known(scores, zero_variance):
    assert make_group(*scores).zero_variance == zero_variance


def test_kinds():
    assert KINDS == ("problem", "pointwise", "pairwise", "reflection")
    assert set(JUDGMENTS) < set(KINDS)


def test_a_bad_record_error_names_the_record_also_after_pickling():
    error = pickle.loads(pickle.dumps(BadRecordError("digits/7", "no image")))
    assert (type(error), error.record_id, error.reason) == (BadRecordError, "digits/7", "no image")
    assert str(error) == "digits/7: no image"
    assert isinstance(error, ValueError)
