"""Every file of the zoo gives its pixels or the reason that it is refused for: to the loader, and to a run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from qwen_vl_utils import vision_process
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from spark_vl.data.images import ImageError, encode_image, load_image
from spark_vl.data.problems import ProblemSet, check
from spark_vl.data.recipes import load_recipe
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, ImageRef
from tests.image_zoo import Specimen, zoo
from tests.test_images import RED, encode

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of bombs and of damaged metadata

TEMPLATER = Templater.load()

PEAK_MB = 100
"""Most memory that loading the whole zoo may add to a process; its bombs would take up to 14 GB."""
LARGEST_MB = 1200
"""Most that the largest picture that is allowed may add: 64 megapixels of 4 bytes, four times where it has alpha."""


@pytest.fixture(params=zoo(), ids=lambda specimen: specimen.name)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return request.param


def test_pixels_or_a_reason(specimen: Specimen) -> None:
    ref = ImageRef(data=specimen.data)
    if specimen.refused:
        for use in (load_image, encode_image):
            with pytest.raises(ImageError, match=specimen.refused):
                use(ref)
        return
    image = load_image(ref)
    assert (image.mode, image.size, image.info) == ("RGB", specimen.size, {})
    for point, color in specimen.colors:
        shown = image.getpixel(point)
        off = max(abs(a - b) for a, b in zip(shown, color, strict=True))
        assert off <= specimen.within, f"{point} is {shown} and should be {color}"


def test_there_are_many() -> None:
    assert len(zoo()) >= 40
    assert sum(specimen.refused is not None for specimen in zoo()) >= 20


# ── a run ──


@pytest.fixture
def problems(tmp_path: Path):
    """Makes the problems of rows with an image each."""
    recipe = tmp_path / "zoo.yaml"
    recipe.write_text(
        "name: zoo\ndescription: odd images\nlicense: none\n"
        f"source: {{jsonl: {tmp_path}}}\nsplits: {{train: train.jsonl}}\n"
        "columns: {question: question, answer: answer, images: image}\nverifier: number\n"
    )

    def make(images: list[Any]) -> ProblemSet:
        rows = [{"question": "How many?", "answer": "1", "image": image} for image in images]
        return ProblemSet(load_recipe(recipe), "train", TEMPLATER, rows, tmp_path)

    return make


def _is_cut_differently(size: tuple[int, int]) -> bool:
    """By the rules of Qwen's own package and of the Hugging Face processor, at the limits of the tests' processor."""
    width, height = size
    limits = {"factor": 28, "min_pixels": 28 * 28, "max_pixels": 224 * 224}
    return vision_process.smart_resize(height, width, **limits) != smart_resize(height, width, **limits)


def test_a_bad_image_is_a_bad_record_and_nothing_else(
    specimen: Specimen, problems, processor, tmp_path: Path, pool
) -> None:
    """In memory and in a file whose name says PNG; neither the processor nor `check` sees another exception."""
    (tmp_path / "picture.png").write_bytes(specimen.data)
    rows = problems([specimen.data, "picture.png"])
    for row in range(len(rows)):
        # Very small ones are read, and then refused where two libraries would cut them differently.
        refused = specimen.refused or ("is resized differently" if _is_cut_differently(specimen.size) else None)
        if refused:
            with pytest.raises(BadRecordError, match=refused):
                processor.process(rows[row])
        else:
            prompt = processor.process(rows[row])
            assert prompt.record.image_sizes[0].original == specimen.size
        processor.forget_images()
    found = list(check(rows, pool))
    assert all(isinstance(each, BadRecordError) == (specimen.refused is not None) for each in found)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """For whom permissions count; a superuser may read everything."""
    if superuser := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("private.png", "cannot be read|cannot be followed"),
        ("folder.png", "not a file"),
        ("fifo.png", "not a file"),
        ("zero.png", "leads out"),
        ("loop.png", "cannot be followed|not a file"),
        ("gone.png", "not a file"),
        ("locked/picture.png", "cannot be followed|not a file"),
    ],
)
def test_what_is_no_readable_file_is_refused(name: str, reason: str, problems, processor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)  # pytest's own folders are closed to nobody
        (root / "locked").mkdir()
        for file in (root / "private.png", root / "locked" / "picture.png"):
            file.write_bytes(encode(Image.new("RGB", (4, 4), RED), "PNG"))
            file.chmod(0)
        (root / "locked").chmod(0)
        (root / "folder.png").mkdir()
        os.mkfifo(root / "fifo.png")
        (root / "zero.png").symlink_to("/dev/zero")
        (root / "loop.png").symlink_to("loop.png")
        rows = problems([name])
        rows.root = root
        try:
            with as_nobody(), pytest.raises(BadRecordError, match=reason):
                processor.process(rows[0])
        finally:
            (root / "locked").chmod(0o755)


def test_a_file_that_goes_while_a_run_holds_its_record_is_a_bad_record(problems, processor, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encode(Image.new("RGB", (4, 4), RED), "PNG"))
    record = problems(["picture.png"])[0]
    file.unlink()
    with pytest.raises(BadRecordError, match="not a file"):
        processor.process(record)


# ── memory ──

MEASURE = """
import json, sys, warnings
from pathlib import Path
from spark_vl.data.images import ImageError, load_image
from spark_vl.records import ImageRef
warnings.simplefilter("ignore")

def peak_mb():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) // 1024

before, refused, files = peak_mb(), 0, sorted(Path(sys.argv[1]).iterdir())
for file in files:
    try:
        load_image(ImageRef(path=file.name, root=sys.argv[1]))
    except ImageError:
        refused += 1
print(json.dumps({"grown_mb": peak_mb() - before, "files": len(files), "refused": refused}))
"""


def measure(folder: Path) -> dict[str, int]:
    """What a fresh process says that loads every file of a folder."""
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures as Linux can")


@needs_linux
def test_the_whole_zoo_takes_little_memory(tmp_path: Path) -> None:
    for number, each in enumerate(zoo()):
        (tmp_path / str(number)).write_bytes(each.data)
    found = measure(tmp_path)
    assert found["files"] == len(zoo())
    assert found["refused"] == sum(each.refused is not None for each in zoo())
    assert found["grown_mb"] < PEAK_MB, found


@needs_linux
@pytest.mark.parametrize("mode", ["1", "I;16", "RGBA"])
def test_the_largest_picture_takes_what_its_pixels_do(mode: str, tmp_path: Path) -> None:
    """It shows, too, that the measure would notice a bomb."""
    (tmp_path / "large").write_bytes(encode(Image.new(mode, (8000, 8000)), "PNG", compress_level=1))
    found = measure(tmp_path)
    assert found["refused"] == 0
    assert PEAK_MB < found["grown_mb"] < LARGEST_MB
