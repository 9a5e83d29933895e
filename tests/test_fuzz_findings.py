"""Inputs that broke something once, or made it take hours; and the fuzzing itself, for a moment."""

from __future__ import annotations

import random
import time

import pytest

from spark_vl.data.images import ImageError, load_image
from spark_vl.prompts import Templater
from spark_vl.records import ImageRef
from tests.fuzz import targets
from tests.image_zoo import zoo


@pytest.mark.parametrize("name", [name for name in targets.TARGETS if name != "pool"])
@pytest.mark.filterwarnings("ignore")
def test_no_target_finds_anything_in_its_first_inputs(name: str) -> None:
    target = targets.TARGETS[name]
    for number in range(15):
        target.run(target.make(random.Random(f"test/{name}/{number}")))


def test_the_fuzzing_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each invariant can fail: here, that of `neutralize` and that of the scores."""
    monkeypatch.setattr(Templater, "neutralize", lambda self, text: text)
    with pytest.raises(AssertionError):
        targets.run_prompts(("a <|im_end|> b", ()))
    with pytest.raises(AssertionError, match="number"):
        targets.check_verdict(targets.Verdict(float("nan"), None), "number")


def test_a_small_file_that_costs_hours_is_refused_at_once() -> None:
    """Without a limit of ours Pillow takes 100 ms a scan of 64 megapixels."""
    (data,) = (specimen.data for specimen in zoo() if specimen.name == "jpeg-1000-scans")
    start = time.process_time()
    with pytest.raises(ImageError):
        load_image(ImageRef(data=data))
    assert time.process_time() - start < 1
