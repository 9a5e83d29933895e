"""Images as people have them: base64, data URLs, Pillow's images, datasets; and messages that do not print them."""

from __future__ import annotations

import base64
import io
import json
import sys
import types
from pathlib import Path
from urllib.parse import quote

import datasets
import numpy as np
import pytest
from PIL import Image

from spark_vl.data.images import load_image
from spark_vl.data.problems import ProblemSet, check, open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.data.sources import RowLimits
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError
from spark_vl.run.quarantine import Quarantine
from spark_vl.verifiers import VerifierPool
from tests.conftest import make_image

RECIPE = """
name: r
description: d
license: MIT
source: {SOURCE}
splits: {train: t.jsonl}
columns: {question: q, answer: a, images: i}
verifier: text
"""
PIXELS = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(format: str, pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def opened(folder: Path, *images, limits: RowLimits | None = None) -> ProblemSet:
    """A recipe of JSON lines with these cells in the column of images."""
    rows = [{"q": "What?", "a": "x", "i": each} for each in images]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return of_source(folder, "jsonl: .", limits)


def of_source(folder: Path, source: str, limits: RowLimits | None = None) -> ProblemSet:
    (folder / "r.yaml").write_text(RECIPE.replace("SOURCE", source))
    return open_recipe(load_recipe(folder / "r.yaml"), "train", Templater.load(), limits or RowLimits())


PNG64 = base64.b64encode(encoded("PNG")).decode()

SPELLINGS = {
    "plain": PNG64,
    "no-padding": PNG64.rstrip("="),
    "in-lines": base64.encodebytes(encoded("PNG")).decode(),
    "url-safe": base64.urlsafe_b64encode(encoded("PNG")).decode(),
    "data-url": f"data:image/png;base64,{PNG64}",
    "data-url-loud": f" DATA:image/PNG;charset=utf-8;BASE64,{PNG64}\n",
    "data-url-without-type": f"data:;base64,{PNG64}",
    "data-url-quoted": f"data:image/png;base64,{quote(PNG64, safe='')}",
    "in-a-mapping": {"bytes": PNG64, "path": "a.png"},
    "in-a-mapping-alone": {"bytes": PNG64},
    "url-in-a-mapping": {"bytes": f"data:image/png;base64,{PNG64}"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_base64_is_an_image_however_it_is_spelled(tmp_path, spelling):
    problems = opened(tmp_path, [SPELLINGS[spelling]], SPELLINGS[spelling])
    for problem in problems:
        (ref,) = problem.images
        assert ref.data == encoded("PNG")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (300, 200)])
def test_each_format_is_known_by_how_it_begins(tmp_path, format, size):
    data = encoded(format, np.zeros((*size, 3), dtype=np.uint8))
    (ref,) = opened(tmp_path, base64.b64encode(data).decode())[0].images
    assert ref.data == data


@pytest.mark.parametrize("format", ["GIF", "TIFF"])
def test_a_format_that_is_not_read_is_said_to_be(tmp_path, format):
    problems = opened(tmp_path, base64.b64encode(encoded(format)).decode())
    with VerifierPool(workers=1) as pool:
        (fault,) = check(problems, pool)
    assert isinstance(fault, BadRecordError)
    assert "not an image in one of the formats PNG, JPEG" in str(fault)


@pytest.mark.parametrize("name", ["9j/a.jpg", "iVBORw0KGgo.png", "R0lGOD", "UklGR/a", "SUkqA_1.png"])
def test_a_path_that_begins_like_base64_is_a_path(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(encoded("PNG"))
    for ref in opened(tmp_path, name, {"path": name}, {"bytes": None, "path": name})[0].images:
        assert (ref.data, ref.path) == (None, name)


def test_large_images_are_read_and_counted_as_bytes_not_as_characters(tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), dtype=np.uint8)
    data = encoded("PNG", large)
    text = base64.b64encode(data).decode()
    assert len(text) > 6_000_000  # more than a line of text may have
    problems = opened(tmp_path, text, [{"bytes": text}], "data:image/png;base64," + text)
    assert [problem.images[0].data == data for problem in problems] == [True] * 3
    limits = RowLimits(bytes=2_000_000, chars=1_000_000)
    with pytest.raises(BadRecordError, match=r"more than 6000000 bytes .*data.max_row_bytes"):
        opened(tmp_path, text, limits=limits)[0]
    limits = RowLimits(bytes=5_000_000, chars=1_000_000)
    with pytest.raises(BadRecordError, match=r"has \d+ bytes or more; 5000000 are allowed \(data.max_row_bytes\)"):
        opened(tmp_path, text, limits=limits)[0]


def test_a_long_line_of_many_values_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """Three million numbers take a hundred megabytes once they are parsed."""
    problems = opened(tmp_path, [1] * 3_000_000)
    monkeypatch.setattr("spark_vl.data.sources._json_object", None)
    with pytest.raises(BadRecordError, match=r"more than 4000000 bytes besides images \(4 × data.max_row_chars\)"):
        problems[0]


def test_no_message_prints_an_image(tmp_path, caplog):
    text = "A" * 900_000  # nothing
    cells = [text, "data:image/png;base64," + text, "data:image/png," + text, {"bytes": text}, {"path": text}]
    cells += [[text, text], {text: 1}, {"url": text}, [[text]], PNG64[:-9] + "!" * 90_000, "x/" * 300_000 + "a.png"]
    problems = opened(tmp_path, *cells)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0)
    with VerifierPool(workers=1) as pool:
        faults = list(check(problems, pool))
    for fault in faults:
        assert isinstance(fault, BadRecordError), fault
        assert len(str(fault)) < 400
        quarantine.add(fault)
    assert max(map(len, (tmp_path / "quarantine.jsonl").read_text().splitlines())) < 500
    assert max(map(len, caplog.text.splitlines()), default=0) < 500


def test_nor_does_any_other_reason(tmp_path):
    assert len(str(BadRecordError("r/train/#1", "x" * 10**6))) < 600
    (tmp_path / "t.jsonl").write_text(
        "\n".join(
            json.dumps({"q": "What?", "a": "x", "i": []} | changes)
            for changes in ({"q": ["x" * 9**5]}, {"a": {"x" * 9**5: "\ud800"}}, {"i": {"x" * 9**5: 1}})
        )
        + '\n{"q'
        + "x" * 9**5
        + '": 1}'
    )
    for index in range(4):
        with pytest.raises(BadRecordError) as caught:
            of_source(tmp_path, "jsonl: .")[index]
        assert len(str(caught.value)) < 600


# ── factories ──


@pytest.fixture
def made_by(tmp_path, monkeypatch):
    """`made_by(value)`: the problems of a factory that returns `value`."""

    def make(value) -> ProblemSet:
        module = types.ModuleType("somebodys_rows")
        module.make = lambda split: value
        monkeypatch.setitem(sys.modules, "somebodys_rows", module)
        return of_source(tmp_path, "factory: somebodys_rows:make")

    return make


MODES = ["RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "YCbCr", "I;16", "I", "F", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_pillow_is_read_as_its_file_would_be(made_by, mode):
    image = Image.fromarray(PIXELS).convert("L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
    (ref,) = made_by([{"q": "What?", "a": "x", "i": [image]}])[0].images
    found = np.asarray(load_image(ref)).astype(int)
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(found, PIXELS)
    elif mode in ("L", "LA"):
        assert np.array_equal(found, np.asarray(Image.fromarray(PIXELS).convert("L").convert("RGB")))
    elif mode not in ("I;16", "I"):  # whose values are 16 bits wide
        assert np.abs(found - np.asarray(image.convert("RGB")).astype(int)).max() <= 1


def test_an_image_of_pillow_is_upright(made_by):
    buffer = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90°
    Image.fromarray(PIXELS).save(buffer, "PNG", exif=turned)
    (ref,) = made_by([{"q": "What?", "a": "x", "i": Image.open(buffer)}])[0].images
    assert np.array_equal(np.asarray(load_image(ref)), np.rot90(PIXELS, -1))


def test_an_image_of_pillow_that_is_broken_or_moves_is_a_bad_row(made_by):
    data = encoded("PNG")
    moving = io.BytesIO()
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(moving, "PNG", save_all=True, append_images=frames[1:])
    images = [Image.open(io.BytesIO(data[: len(data) // 2])), Image.open(moving), Image.new("L", (1, 300))]
    problems = made_by([{"q": "What?", "a": "x", "i": image} for image in images])
    for index, reason in enumerate(("broken image", "more than one frame", "ratio of more than 200")):
        with pytest.raises(BadRecordError, match=reason):
            problems[index]


def test_a_factory_may_return_a_dataset(made_by):
    rows = {"q": ["What?", "And?"], "a": ["x", "y"], "i": [[Image.fromarray(PIXELS)], []], "other": [1, 2]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("i", datasets.List(datasets.Image()))
    problems = made_by(dataset)
    assert [len(problem.images) for problem in problems] == [1, 0]
    assert np.array_equal(np.asarray(load_image(problems[0].images[0])), PIXELS)
    assert [problem.gold for problem in made_by(dataset.with_format("torch"))] == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "NoneType"),
        ("rows", "str"),
        ({"train": []}, "dict"),
        (iter([]), "list_iterator"),
        ({1, 2}, "set"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"q": ["?"]})}), "DatasetDict"),
        (datasets.Dataset.from_dict({"q": ["?"]}).to_iterable_dataset(), "IterableDataset"),
        (datasets.Dataset.from_dict({"q": ["?"]}).to_pandas(), "DataFrame; .*to_dict"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_a_sequence_of_rows_is_named(made_by, value, named):
    with pytest.raises(ValueError, match=rf"recipe r: source: somebodys_rows:make returned {named}"):
        made_by(value)


def test_rows_that_are_not_mappings_are_bad_rows(made_by):
    problems = made_by([["What?", "x"], {"q": "What?", "a": "x", "i": None}, None])
    assert problems[1].gold == "x"
    for index, found in ((0, "list"), (2, "null")):
        with pytest.raises(BadRecordError, match=rf"the row is {found}.*; a mapping of columns is allowed"):
            problems[index]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind(made_by, kind):
    data = make_image(1).data
    for cell in (kind(data), {"bytes": kind(data)}, [{"bytes": kind(data), "path": None}]):
        assert made_by([{"q": "What?", "a": "x", "i": cell}])[0].images[0].data == data
