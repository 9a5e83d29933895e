"""Inputs that broke something once, or made it take hours; and the fuzzing itself, for a moment."""

from __future__ import annotations

import random
import time

import pytest

from spark_vl.data.images import ImageError, load_image
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
    monkeypatch.setattr(targets, "neutralize", lambda text: text)
    with pytest.raises(AssertionError):
        targets.run_prompts(("a <|im_end|> b", ()))
    with pytest.raises(AssertionError, match="number"):
        targets.check_verdict(targets.Verdict(float("nan"), None), "number")


@pytest.mark.parametrize("name", ["jpeg-1000-scans", "gif-comment-blocks", "gif-comment-many", "tiff-huge-tile"])
def test_small_files_that_cost_hours_or_gigabytes_are_refused_at_once(name: str) -> None:
    """Without a limit of ours Pillow takes 100 ms a scan of 64 megapixels, 5 s for 8 MB of comments (a time that grows
    with the square), and 1.6 GB for a tile."""
    (data,) = (specimen.data for specimen in zoo() if specimen.name == name)
    start = time.process_time()
    with pytest.raises(ImageError):
        load_image(ImageRef(data=data))
    assert time.process_time() - start < 1
