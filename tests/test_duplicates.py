"""Training problems that a benchmark asks, too, are found, and can be left out."""

from __future__ import annotations

import io
import json
import random
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from spark_vl.cli import main
from spark_vl.data.duplicates import ALIKE, Duplicate, find_duplicates, hash_image, question_key
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.prompts import Templater
from spark_vl.records import ImageRef
from tests.conftest import make_record

TEMPLATER = Templater.load()


def drawing(seed: int) -> Image.Image:
    """Some black lines and circles on white, as in a textbook."""
    rng = random.Random(seed)
    image = Image.new("RGB", (rng.randint(200, 400), rng.randint(200, 400)), "white")
    draw = ImageDraw.Draw(image)
    for shape in range(6):
        left, top = rng.randint(0, 150), rng.randint(0, 150)
        box = (left, top, left + rng.randint(20, 200), top + rng.randint(20, 200))
        (draw.line if shape % 2 else draw.ellipse)(
            box, width=2, **({"fill": "black"} if shape % 2 else {"outline": "black"})
        )
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def ref(image: Image.Image) -> ImageRef:
    return ImageRef(data=encoded(image))


@pytest.mark.parametrize("seed", range(6))
def test_an_image_is_alike_however_it_is_scaled_and_compressed(seed: int) -> None:
    image = drawing(seed)
    third = image.resize((image.width // 3, image.height // 3), Image.Resampling.BICUBIC)
    jpeg = Image.open(io.BytesIO(encoded(image, "JPEG", quality=30)))
    for other in (third, jpeg, image.convert("L"), image.resize((640, 480))):
        assert hash_image(image).is_alike(hash_image(other))


def test_images_that_differ_are_not_alike() -> None:
    hashes = [hash_image(drawing(seed)).bits for seed in range(20)]
    assert min((a ^ b).bit_count() for a, b in combinations(hashes, 2)) > 1.5 * ALIKE
    changed = drawing(1)
    ImageDraw.Draw(changed).rectangle((0, 0, 120, 200), fill="black")
    assert not hash_image(changed).is_alike(hash_image(drawing(1)))


def test_flat_images_are_alike_only_if_their_pixels_are_equal() -> None:
    white, gray, large = (
        hash_image(Image.new("RGB", size, color))
        for size, color in (((9, 9), "white"), ((9, 9), "gray"), ((64, 80), "white"))
    )
    assert white.bits is None
    assert white.is_alike(large)
    assert not white.is_alike(gray)
    assert not white.is_alike(hash_image(drawing(0)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("<image>\nFind x.", "Find  X", True),
        ("Find x. <image>", "Find y.", False),
        ("What is 2.5 + 1?", "What is 25 + 1?", False),
        ("What is 5 - 3?", "What is 5 + 3?", False),
        ("Which? (A) 3 (B) 4", "Which?\nA. 3\nB. 4", True),
        ("求 x 的值。", "求x的值", True),
    ],
)
def test_what_of_a_question_counts(one: str, other: str, same: bool) -> None:
    assert (question_key(one) == question_key(other)) is same


def test_question_and_images_have_to_be_the_same() -> None:
    first, second, small = drawing(1), drawing(2), drawing(1).resize((120, 120))
    benchmark = [
        make_record("b/0", ref(first), "Find x."),
        make_record("b/1", ref(second), "Find x."),
        make_record("b/2", "What is 7 times 8?"),
        make_record("b/3", ref(first), ref(second), "Compare."),
        make_record("b/4", ref(Image.new("RGB", (9, 9), "white")), "What is it?"),
    ]
    problems = [
        make_record("t/0", ref(small), "Find X"),  # the first
        make_record("t/1", ref(drawing(3)), "Find x."),  # the question alone
        make_record("t/2", ref(small), "Find y."),  # the image alone
        make_record("t/3", "What is 7 times 8 ?"),
        make_record("t/4", ref(second), ref(first), "Compare."),  # in another order
        make_record("t/5", ref(second), "Find x."),
        make_record("t/6", ref(Image.new("RGB", (9, 9), "white")), "What else?"),  # flat images say nothing
        make_record("t/7", "What is 7 plus 8?"),
    ]
    assert list(find_duplicates(problems, benchmark)) == [
        Duplicate("t/0", "b/0", "same"),
        Duplicate("t/2", "b/0", "image"),
        Duplicate("t/3", "b/2", "same"),
        Duplicate("t/4", "b/1", "image"),
        Duplicate("t/5", "b/1", "same"),
    ]
    assert list(find_duplicates(problems, [])) == []


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training set of four rows, two of which are in a benchmark, and one of which has a broken image."""
    for name, image in (("a", drawing(1)), ("b", drawing(2)), ("small", drawing(1).resize((120, 120)))):
        (tmp_path / f"{name}.png").write_bytes(encoded(image))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    rows = {
        "train": [
            {"id": "x", "q": "find X", "i": "small.png"},
            {"q": "Find x.", "i": "b.png"},
            {"q": "Find z.", "i": "broken.png"},
            {"q": "What is 7 times 8?"},
        ],
        "bench": [{"q": "Find x.", "i": "a.png"}, {"q": "What is 7 times 8?", "id": "y"}],
    }
    for name, split in (("train", "train"), ("bench", "test")):
        lines = "".join(json.dumps(row | {"a": 1}) + "\n" for row in rows[name])
        (tmp_path / f"{name}.jsonl").write_text(lines)
        fields = {"name": name, "description": "x", "license": "MIT", "source": {"jsonl": "."}, "verifier": "number"}
        columns = {"question": "q", "answer": "a", "images": "i", "id": "id"}
        recipe = fields | {"splits": {split: f"{name}.jsonl"}, "columns": columns}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_duplicates_are_listed_and_left_out(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", "train.yaml", "--against", "bench.yaml", "--write", "seen.txt"])
    assert stopped.value.code == 1
    first, second, broken, count = capsys.readouterr().out.splitlines()
    assert (first, second) == ("train/train/x is bench/test/#0", "train/train/#3 is bench/test/y")
    assert broken.startswith("cannot be used: train/train/#2: ")
    assert count == "2 of 4 rows are in bench.yaml; 0 more share an image with one there"
    assert (recipes / "seen.txt").read_text() == "train/train/x\ntrain/train/#3\n"
    whole = open_recipe(load_recipe("train.yaml"), "train", TEMPLATER)
    rest = open_recipe(load_recipe("train.yaml", exclude="seen.txt"), "train", TEMPLATER)
    assert (len(whole), len(rest), rest[0].id) == (4, 2, "train/train/#1")
    assert rest.fingerprint["exclude"] != whole.fingerprint["exclude"] is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("train/train/x2\n", "no row has the id train/train/x2; the data may be another one"),
        ("train/train/x\ntrain/train/#1\ntrain/train/#2\ntrain/train/#3\n", "leaves no row"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_ids_that_does_not_fit_is_an_error(recipes: Path, ids: str | None, message: str) -> None:
    if ids is not None:
        (recipes / "ids.txt").write_text(ids)
    with pytest.raises(ValueError, match=rf"recipe train: exclude: .*ids\.txt:? {message}"):
        open_recipe(load_recipe("train.yaml", exclude="ids.txt"), "train", TEMPLATER)


def test_ids_of_other_recipes_and_splits_do_not_count(recipes: Path) -> None:
    (recipes / "ids.txt").write_text("train/test/x\nother/train/x\n\n")
    assert len(open_recipe(load_recipe("train.yaml", exclude="ids.txt"), "train", TEMPLATER)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "bench.yaml"), "--against and --write need a NAME, and --write needs --against"),
        (("train.yaml", "--write", "x"), "--against and --write need a NAME, and --write needs --against"),
        (("train.yaml", "--against", "nothing"), "no recipe 'nothing'"),
        (("train.yaml", "--against", "train.yaml"), "recipe train: splits: found 'test'; allowed: train"),
    ],
)
def test_mistakes_are_errors_in_words(recipes: Path, arguments: tuple[str, ...], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (recipes / "x").exists()
