"""Recipes: one YAML file says where a dataset is, which column is what, and which verifier scores it.

    name: geometry3k
    description: Plane geometry with diagrams
    license: MIT
    source: {hub: {id: hiyouga/geometry3k}}       # or jsonl, csv, parquet, folder: a path; or factory: module:function
    splits: {train: train, test: test}            # ours → the split's name at the source, or its file or folder
    columns: {question: problem, answer: answer, images: images}
    verifier: math                                # or one for each split: {train: math, test: choice}

`docs/your_data.md` shows each field with rows that go with it.

A file that starts from another recipe names it as its `base` and holds only what differs, for example where the images
of ViRL39K were unpacked: `{base: virl39k, media_root: /data/ViRL39K}`. Paths are relative to the recipe file.

A file may have `parameters`, with their defaults, or null where one has to be given: `{repo: null, revision: main}`.
`${repo}` in its texts stands for what the name of the recipe says: `judgments?repo=org/name&revision=v1` (written as
the query of a URL is). In `data.recipes` any name may have a `weight`, alone or beside parameters: `digits?weight=0.5`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from importlib.machinery import PathFinder
from math import inf
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl

import yaml

from spark_vl.data.benchmarks import ADAPTERS, PREFERENCES
from spark_vl.data.judgments import CONFIGS, Config, record_columns
from spark_vl.data.sources import FILES, Source, SourceType
from spark_vl.records import did_you_mean, writable
from spark_vl.verifiers.base import SELF_JUDGE, VERIFIERS, absolute_name, check_own_verifier, check_settings, file_of
from spark_vl.verifiers.shaping import SHAPING

SPLITS = ("train", "validation", "test")
RECIPE_NAME = r"[A-Za-z0-9][\w.-]*"
"""In ASCII. It is part of the ids of rows and of the names of files."""


@dataclass(frozen=True)
class Columns:
    """Which column is what. The question and the answer must be in every row. A cell of the others may be null, and a
    row of JSON may leave it out; but a column that no row has is an error."""

    question: str
    """Text, in which the image placeholder stands where an image belongs; without placeholders, images go first."""
    answer: str | None = None
    r"""Text; where it holds a `\boxed{}`, the content of the last one is the gold answer. Or a number, true, false, a
    list or a mapping, which are taken as JSON: `[12, 30, 80, 90]` for a box, `["colour", "color"]` for `text`. Rows
    with the verifier `self_judge` need none; it may be left out where all have it."""
    images: str | None = None
    """One image or a list: encoded bytes, `{"bytes", "path"}`, or a path below the media root, relative or absolute. A
    text that is a JSON list is a list, here and in `choices`."""
    choices: str | None = None
    """List of options. Where it is not empty, they are shown after the question (unless it shows them already), the
    answer may be the letter or the text of the right one, and the verifier is `choice`."""
    id: str | None = None
    """Text or integer; a row without one has its number (`#17`). Of rows that share one, the first keeps it, and the
    others get the number of their row added: `ID#17`."""
    verifier: str | None = None
    """Name of the row's verifier: one of `VERIFIERS`, or one that the recipe names under `verifier` or `settings`.
    null: the recipe's."""
    settings: str | None = None
    """Mapping of settings of the row's verifier, which replace those of the recipe: `{"decimals": 2}`. Nulls in it do
    not count."""

    @property
    def used(self) -> tuple[str, ...]:
        """The names of all columns of rows, each once."""
        return tuple(dict.fromkeys(name for name in vars(self).values() if name is not None))


@dataclass(frozen=True)
class Range:
    """The cells that a filter `{min: 0.1, max: 0.9}` keeps: numbers in it, texts with so many characters, and lists
    with so many items. A null, true and false are not in any."""

    min: float = -inf
    max: float = inf

    def __contains__(self, cell: Any) -> bool:
        value = len(cell) if isinstance(cell, str | list | tuple) else cell
        return isinstance(value, int | float) and not isinstance(value, bool) and self.min <= value <= self.max


@dataclass(frozen=True)
class JudgmentColumns:
    """The columns of a judgment dataset, which are fixed (`judgments.features`)."""

    judgments: Config
    """Which of its configurations. The rows of all but `rollouts` are judge and reflection prompts as they are."""
    id: str = field(default="id", init=False)
    images: None = field(default=None, init=False)
    """They are looked for in the row itself, and never at a path."""

    @property
    def used(self) -> tuple[str, ...]:
        """The names of all columns of rows."""
        return record_columns(self.judgments)


@dataclass(frozen=True)
class PreferenceColumns:
    """The columns of a reward benchmark, whose rows are answers to compare (`preferences.open_preferences`)."""

    preferences: str
    """Which benchmark: a name in `benchmarks.PREFERENCES`, which says how its rows are read."""
    id: None = field(default=None, init=False)
    images: None = field(default=None, init=False)

    @property
    def used(self) -> tuple[str, ...]:
        """The names of all columns of rows."""
        return PREFERENCES[self.preferences].reads


AnyColumns = Columns | JudgmentColumns | PreferenceColumns


@dataclass(frozen=True)
class Recipe:
    """A dataset, and how its rows become problems."""

    name: str
    description: str
    license: str
    """License of the data, as its card names it; judgments that are recycled from it carry it on."""
    source: Source
    splits: Mapping[str, str]
    """train, validation or test → the split at the source (see `sources.open_rows`)."""
    columns: AnyColumns
    verifier: str | Mapping[str, str] | None = None
    """Name of the verifier of the rows that name none, or one for each split: one of `VERIFIERS`, `module:function`,
    `./file.py:function`, relative to the recipe file, or `self_judge`, for rows without a right answer
    (`SelfJudgeConfig`). `math` gives way to `choice` in rows whose answer is one capital letter and whose question
    letters its options. None: each row names its own (`columns.verifier`), as those of judgment datasets do, which may
    name this one besides `VERIFIERS`."""
    media_root: str | None = None
    """Folder that image paths are relative to and cannot leave. None: that of a local source; no paths for others."""
    image_placeholder: str = "<image>"
    """What stands in a question where an image belongs."""
    answer_after: str | None = None
    """What the right answer stands behind, where the column of the answer holds a whole solution: `####`. A row without
    it is bad. None: the column holds the answer."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Verifier → its settings, such as `{number: {relative: 0.05}, iou: {coordinates: thousand}}`."""
    filter: Mapping[str, tuple[Any, ...] | Range] = field(default_factory=dict)
    """Column → the values that a row may have there; rows with another one are no part of the dataset. In a file, one
    value, a list, or a range: `{subject: [algebra, geometry], has_image: true, pass_rate: {min: 0.1, max: 0.9}}`. Ids
    count all rows of the source."""
    exclude: str | None = None
    """File with ids of records, one a line, that are no part of the dataset, as `spark-vl recipes NAME --against
    BENCHMARK --write FILE` makes it; those of other recipes and splits do not count."""
    adapter: str | None = None
    """What turns the source's rows into rows with the columns that are named here: a name in `benchmarks.ADAPTERS`.
    None: they have them already."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Name of a tag → the column that holds its values, texts or numbers: `{version: problem_version}`. Records carry
    them, and evaluation groups by them; a null is no tag."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the score and of shaping terms (`verifiers.shaping`) in the reward. In a file they replace the
    verifier's name: `verifier: {math: 1.0, format: 0.1}`."""
    pixels: Range | None = None
    """Width × height that every image of a row must have, as it is stored; rows with another one are no part of the
    dataset, and rows without images are. It is looked up when a row is drawn. In a file, a range:
    `{min: 784, max: 1048576}`."""
    per_epoch: float = 1.0
    """How often each row is asked in an epoch of training: the `weight` of the name, and no field of a file
    (`PromptSampler`)."""

    @property
    def shaping(self) -> dict[str, float]:
        """The weights of the shaping terms."""
        return {name: weight for name, weight in self.weights.items() if name in SHAPING}

    @property
    def weight(self) -> float:
        """The weight of the score."""
        return next((weight for name, weight in self.weights.items() if name not in SHAPING), 1.0)

    def verifier_of(self, split: str) -> str | None:
        """The verifier of the rows of `split` that name none."""
        return self.verifier[split] if isinstance(self.verifier, Mapping) else self.verifier

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The names of all columns of the source that are read, each once."""
        used = (*self.columns.used, *self.tags.values(), *self.filter)
        if self.adapter is not None:
            adapter = ADAPTERS[self.adapter]
            used = (*(name for name in used if name not in adapter.makes), *adapter.reads)
        return tuple(dict.fromkeys(used))

    @property
    def own_verifiers(self) -> frozenset[str]:
        """The verifiers that it names, besides `VERIFIERS`. They are the user's code."""
        named = self.verifier.values() if isinstance(self.verifier, Mapping) else [self.verifier]
        return frozenset({*named, *self.settings} - {*VERIFIERS, SELF_JUDGE, None})


def recipes() -> list[str]:
    """The names of the shipped recipes, sorted."""
    folder = resources.files("spark_vl.data_recipes")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def usage(name: str) -> str:
    """How the shipped recipe `name` is written, with the parameters that have to be given: `judgments?repo=REPO`.

    It is a name that `load_recipe` takes, but its source is nowhere.
    """
    parameters = yaml.safe_load(_shipped(name)).get("parameters", {})
    missing = [parameter for parameter, default in parameters.items() if default is None]
    return f"{name}?{'&'.join(f'{parameter}={parameter.upper()}' for parameter in missing)}" if missing else name


def load_recipe(name_or_path: str | Path, **overrides: Any) -> Recipe:
    """The shipped recipe of that name, or the one in that YAML file.

    Args:
        name_or_path: with its parameters, if it has any: `judgments?repo=org/name&kind=pairwise`, and its weight.
        overrides: fields that replace those of the file, in the form that they have in YAML, for instance to read a
            local copy: `load_recipe("geometry3k", source={"parquet": "data"}, splits={"train": "train-*.parquet"})`.
            Paths are relative to the working directory.

    Raises:
        ValueError: naming the file, the field, what was found and what is allowed.
    """
    name, weight = _weight(str(name_or_path))
    raw, where = _read(name, ())
    return _recipe(raw | _absolute(overrides, Path.cwd()), where, weight)


def load_recipes(names: Iterable[str]) -> list[Recipe]:
    """Recipes that are used together.

    Raises:
        ValueError: see `load_recipe` and `check_verifiers`; or two have the same name, which the ids of their rows
            start with.
    """
    loaded = [load_recipe(name) for name in names]
    for recipe in loaded:
        check_verifiers(recipe)
    if repeated := [name for name, count in Counter(recipe.name for recipe in loaded).items() if count > 1]:
        raise ValueError(f"more than one is named {', '.join(repeated)}; names are unique")
    return loaded


def check_verifiers(recipe: Recipe) -> None:
    """Import the user's own verifiers that `recipe` names, and check that they can be called, and their settings.

    Raises:
        ValueError: names the recipe, the verifier, and what is wrong.
    """
    for name in sorted(recipe.own_verifiers):
        try:
            check_own_verifier(name)
            check_settings(name, recipe.settings.get(name, {}))
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name}: {error}") from error


def _weight(name_or_path: str) -> tuple[str, float]:
    """A recipe's name without its weight, and the weight."""
    name, _, query = name_or_path.partition("?")
    pairs = query.split("&")
    weights = [value for key, _, value in (pair.partition("=") for pair in pairs) if key == _WEIGHT]
    if not weights:
        return name_or_path, 1.0
    try:
        [weight] = map(float, weights)
    except ValueError:  # several, or no number
        weight = 0.0
    if not 0 < weight < inf:
        raise ValueError(f"{name_or_path}: weight: found {', '.join(map(repr, weights))}; allowed: one number above 0")
    rest = "&".join(pair for pair in pairs if pair.partition("=")[0] != _WEIGHT)
    return f"{name}?{rest}" if rest else name, weight


_WEIGHT = "weight"


def _shipped(name: str) -> str:
    return resources.files("spark_vl.data_recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _read(name_or_path: str, derived: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The fields of a recipe, its base's included, and its file for messages; `derived`: files that start from it."""
    name, _, query = name_or_path.partition("?")
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        where, folder = str(path), path.resolve().parent
        if not path.is_file():
            raise ValueError(f"{where}: this recipe file does not exist")
        text = path.read_text(encoding="utf-8")
    elif name in recipes():
        where, folder, text = f"{name}.yaml", Path.cwd(), _shipped(name)
    else:
        raise ValueError(
            f"no recipe {name!r}{did_you_mean(name, recipes())}; allowed: {', '.join(recipes())}, or the path of a "
            "file that ends in .yaml"
        )
    if where in derived:
        raise ValueError(f"{where}: base: is a base of itself ({' → '.join([*derived, where])})")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: found {_shown(raw)}; allowed: a mapping of fields")
    raw = _absolute(_filled(raw, query, where), folder)
    if "base" not in raw:
        return raw, where
    base, mark, query = _text(where, "base", raw.pop("base")).partition("?")
    if (beside := folder / base).suffix in (".yaml", ".yml"):
        base = str(beside)
    return _read(f"{base}{mark}{query}", (*derived, where))[0] | raw, where


def _filled(raw: dict[str, Any], query: str, where: str) -> dict[str, Any]:
    """`raw` without its parameters, and in its texts what `query`, or their default, has for each."""
    raw = dict(raw)
    defaults = raw.pop("parameters", {})
    if not isinstance(defaults, dict) or not all(
        isinstance(key, str) and isinstance(value, str | None) for key, value in defaults.items()
    ):
        raise ValueError(f"{where}: parameters: found {_shown(defaults)}; allowed: a mapping of names to texts or null")
    if _WEIGHT in defaults:
        raise ValueError(f"{where}: parameters: {_WEIGHT} has a meaning in every recipe; take another name")
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise ValueError(f"{where}: found {query!r}; allowed: parameters as name=value&name=value") from error
    values = defaults | dict(given)
    allowed = ", ".join(defaults) or "none"
    if unknown := [name for name, _ in given if name not in defaults]:
        raise ValueError(f"{where}: {unknown[0]!r} is not a parameter; allowed: {allowed}")
    if len(dict(given)) != len(given):
        raise ValueError(f"{where}: found {query!r}; allowed: each parameter once")
    if missing := [name for name, value in values.items() if not value]:
        raise ValueError(f"{where}: parameter {missing[0]}: is missing; write {Path(where).stem}?{missing[0]}=…")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return re.sub(r"\$\{(.*?)\}", parameter, value) if isinstance(value, str) else value

    def parameter(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{where}: {match[0]}: is not a parameter; allowed: {allowed}")
        return values[match[1]]

    return filled(raw) if defaults else raw


def _absolute(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` with its paths made absolute, relative ones from `folder`."""
    raw = dict(raw)
    for key in ("media_root", "exclude"):
        if isinstance(raw.get(key), str):
            raw[key] = str(folder / Path(raw[key]).expanduser())
    if isinstance(raw.get("source"), dict):
        raw["source"] = {
            kind: str(folder / Path(value).expanduser()) if kind in FILES and isinstance(value, str) else value
            for kind, value in raw["source"].items()
        }
    match raw.get("verifier"):
        case str(name):
            raw["verifier"] = absolute_name(name, folder)
        case {**names} if set(names) & set(SPLITS):
            raw["verifier"] = {
                split: absolute_name(name, folder) if isinstance(name, str) else name for split, name in names.items()
            }
        case {**names}:
            raw["verifier"] = {absolute_name(str(name), folder): weight for name, weight in names.items()}
    if isinstance(raw.get("settings"), dict):
        raw["settings"] = {absolute_name(str(name), folder): value for name, value in raw["settings"].items()}
    return raw


def _recipe(raw: dict[str, Any], where: str, per_epoch: float) -> Recipe:
    _check_fields(where, "", raw, Recipe)
    name = _text(where, "name", raw["name"])
    if not re.fullmatch(RECIPE_NAME, name, re.ASCII):
        raise ValueError(f"{where}: name: found {name!r}; allowed: letters, digits, '.', '_' and '-'")
    splits = _mapping(where, "splits", raw["splits"])
    if not splits or set(splits) - set(SPLITS):
        raise ValueError(f"{where}: splits: found {_shown(splits)}; allowed: one or more of {', '.join(SPLITS)}")
    verifier, weights = _verifier(where, raw.get("verifier"), splits)
    columns = _columns(where, raw["columns"])
    optional = {
        key: _text(where, key, raw[key])
        for key in ("media_root", "image_placeholder", "answer_after", "exclude")
        if raw.get(key) is not None
    }
    if isinstance(columns, JudgmentColumns) and optional:
        raise ValueError(f"{where}: {next(iter(optional))}: does not apply to a judgment dataset; leave it out")
    pixels = _pixels(where, raw.get("pixels"), columns)
    if isinstance(columns, PreferenceColumns):
        for key in ("verifier", "settings", "adapter", "tags", *optional):
            if raw.get(key):
                raise ValueError(f"{where}: {key}: does not apply to a reward benchmark; leave it out")
    adapter = raw.get("adapter")
    if adapter is not None and adapter not in ADAPTERS:
        raise ValueError(f"{where}: adapter: found {_shown(adapter)}; allowed: {', '.join(ADAPTERS)}")
    if isinstance(columns, Columns) and verifier is None and columns.verifier is None:
        raise ValueError(f"{where}: verifier: is missing, and so is columns.verifier, which may name one in each row")
    named = [] if verifier is None else list(verifier.values()) if isinstance(verifier, dict) else [verifier]
    for name_of_verifier in named:
        _check_verifier(where, "verifier", name_of_verifier)
    if isinstance(columns, Columns) and columns.answer is None and {*named} != {SELF_JUDGE}:
        raise ValueError(f"{where}: columns.answer: is missing")
    settings = _settings(where, raw.get("settings", {}), columns, named)
    return Recipe(
        name=name,
        description=_text(where, "description", raw["description"]),
        license=_text(where, "license", raw["license"]),
        source=_source(where, raw["source"]),
        splits=splits,
        columns=columns,
        verifier=verifier,
        settings=settings,
        filter=_filter(where, raw.get("filter", {}), columns),
        adapter=adapter,
        tags=_mapping(where, "tags", raw.get("tags", {})),
        weights=weights,
        pixels=pixels,
        per_epoch=per_epoch,
        **optional,
    )


def _settings(where: str, raw: Any, columns: AnyColumns, named: list[str]) -> dict[str, dict[str, Any]]:
    """Verifier → its settings. Those of the user's own verifiers are left to `check_verifiers`.

    Args:
        named: the verifiers that the recipe names elsewhere.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: settings: found {_shown(raw)}; allowed: a mapping of verifiers to their settings")
    if raw and isinstance(columns, JudgmentColumns):
        raise ValueError(
            f"{where}: settings: does not apply to a judgment dataset, whose rows have theirs; leave it out"
        )
    for name, settings in raw.items():
        if not isinstance(settings, dict):
            of = next(iter(named), "number")
            raise ValueError(
                f"{where}: settings.{name}: found {_shown(settings)}; settings stand below the name of their verifier: "
                f"settings: {{{of}: {{{name}: {settings}}}}}"
            )
        if name == SELF_JUDGE:
            raise ValueError(f"{where}: settings: {name} has none here; they are those of the run (self_judge)")
        _check_verifier(where, "settings", name)
        if name in VERIFIERS:
            try:
                check_settings(name, settings)
            except ValueError as error:
                raise ValueError(f"{where}: settings: {error}") from error
        if isinstance(columns, Columns) and columns.verifier is None and name not in {*named, "choice"}:
            raise ValueError(
                f"{where}: settings: no row has the verifier {name!r}; it has to be named in `verifier`, or "
                "`columns.verifier` has to say which column names it"
            )
    return raw


def _check_verifier(where: str, field: str, name: Any) -> None:
    """A name of `VERIFIERS`, or a function of a module or file that is there. It is not imported."""
    name = _text(where, field, name)
    if name in VERIFIERS or name == SELF_JUDGE:
        return
    place, _, function = name.rpartition(":")
    if not place or not function:
        why = "this is none of them"
    elif (file := file_of(name)) is not None:
        if file.is_file():
            return
        why = f"there is no file {place}"
    elif not _is_there(place):
        why = f"there is no module {place!r} on sys.path; of a file beside the recipe, write ./{place}.py:{function}"
    else:
        return
    allowed = f"{', '.join(VERIFIERS)}, {SELF_JUDGE}, module:function, or ./file.py:function"
    raise ValueError(f"{where}: {field}: found {name!r}; allowed: {allowed} ({why})")


def _is_there(module: str) -> bool:
    """Whether `module` can be found. `importlib.util.find_spec` would run the packages that contain it."""
    first, *inner = parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    spec = next((spec for finder in sys.meta_path if (spec := finder.find_spec(first, None))), None)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec is not None


def _verifier(where: str, raw: Any, splits: Mapping[str, str]) -> tuple[Any, dict[str, float]]:
    """The verifier, or one for each split, and the weights of score and shaping terms."""
    if not isinstance(raw, dict):
        return raw, {}
    if set(raw) & set(SPLITS):
        verifier = _mapping(where, "verifier", raw)
        if set(splits) - set(verifier):
            raise ValueError(
                f"{where}: verifier: found {_shown(verifier)}; allowed: a name, or one for each of {', '.join(splits)}"
            )
        return verifier, {}
    verifiers = [name for name in raw if name not in SHAPING]
    if len(verifiers) != 1 or not isinstance(verifiers[0], str):
        raise ValueError(
            f"{where}: verifier: found {_shown(raw)}; allowed: one verifier and any of the shaping terms "
            f"{', '.join(SHAPING)}, each with its weight"
        )
    for name, weight in raw.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < inf:
            raise ValueError(f"{where}: verifier.{name}: found {_shown(weight)}; allowed: a finite weight from 0")
    return verifiers[0], {name: float(weight) for name, weight in raw.items()}


def _columns(where: str, raw: Any) -> AnyColumns:
    columns = _mapping(where, "columns", raw)
    if "preferences" in columns:
        name = columns["preferences"]
        if len(columns) > 1:
            raise ValueError(f"{where}: columns: found {_shown(raw)}; allowed beside preferences: nothing")
        if name not in PREFERENCES:
            raise ValueError(f"{where}: columns.preferences: found {name!r}; allowed: {', '.join(PREFERENCES)}")
        return PreferenceColumns(name)
    if "judgments" not in columns:
        _check_fields(where, "columns.", columns, Columns)
        return Columns(**columns)
    if len(columns) > 1:
        raise ValueError(f"{where}: columns: found {_shown(raw)}; allowed beside judgments: nothing")
    if columns["judgments"] not in CONFIGS:
        raise ValueError(f"{where}: columns.judgments: found {columns['judgments']!r}; allowed: {', '.join(CONFIGS)}")
    return JudgmentColumns(columns["judgments"])


def _filter(where: str, raw: Any, columns: AnyColumns) -> dict[str, tuple[Any, ...] | Range]:
    if not isinstance(raw, dict) or not all(isinstance(column, str) for column in raw):
        raise ValueError(f"{where}: filter: found {_shown(raw)}; allowed: a mapping of columns to values")
    if raw and isinstance(columns, JudgmentColumns):
        raise ValueError(f"{where}: filter: does not apply to a judgment dataset; leave it out")
    wanted: dict[str, tuple[Any, ...] | Range] = {}
    for column, value in raw.items():
        if _is_range(value):
            wanted[column] = Range(**value)
            continue
        wanted[column] = values = tuple(value) if isinstance(value, list) else (value,)
        if not values or not all(isinstance(value, str | int | float | None) for value in values):
            allowed = "a text, a number, true, false or null, a list of them, or a range {min: 0, max: 1}"
            raise ValueError(f"{where}: filter.{column}: found {_shown(raw[column])}; allowed: {allowed}")
    return wanted


def _pixels(where: str, raw: Any, columns: AnyColumns) -> Range | None:
    if raw is None:
        return None
    if not _is_range(raw):
        raise ValueError(f"{where}: pixels: found {_shown(raw)}; allowed: a range {{min: 784, max: 1048576}}")
    if columns.images is None:
        raise ValueError(f"{where}: pixels: does not apply, since columns.images names no column; leave it out")
    return Range(**raw)


def _is_range(value: Any) -> bool:
    bounds = value.values() if isinstance(value, dict) and value and set(value) <= {"min", "max"} else (None,)
    return all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds)


def _source(where: str, raw: Any) -> Source:
    kinds = get_args(SourceType)
    if not isinstance(raw, dict) or len(raw) != 1 or not set(raw) <= set(kinds):
        raise ValueError(f"{where}: source: found {_shown(raw)}; allowed: one of {', '.join(kinds)}")
    [(kind, value)] = raw.items()
    if kind == "hub":
        value = _mapping(where, "source.hub", value)
        if "id" not in value or set(value) - {"id", "config", "revision"}:
            raise ValueError(
                f"{where}: source.hub: found {_shown(value)}; allowed: id, and optionally config, revision"
            )
        return Source(kind, value["id"], value.get("config"), value.get("revision"))
    location = _text(where, f"source.{kind}", value)
    if kind in FILES and Path(location).is_file():
        folder, file = Path(location).parent, Path(location).name
        raise ValueError(
            f"{where}: source.{kind}: {location!r} is a file; name its folder here, and the file as a split: "
            f"source: {{{kind}: {folder}}}, splits: {{train: {file}}}"
        )
    if kind == "factory" and not re.fullmatch(r"[\w.]+:\w+", location):
        raise ValueError(f"{where}: source.factory: found {location!r}; allowed: module:function")
    return Source(kind, location)


_NO_FIELDS = ("weights", "per_epoch")
"""Of `Recipe`, what comes with the verifier and with the name."""


def _check_fields(where: str, prefix: str, raw: dict[str, Any], cls: type) -> None:
    """Neither unknown nor missing keys."""
    known = [each.name for each in fields(cls) if each.name not in _NO_FIELDS]
    if unknown := [key for key in raw if key not in known]:
        raise ValueError(f"{where}: {prefix}{unknown[0]}: is not a field; allowed: {', '.join(known)}")
    for each in fields(cls):
        if each.default is MISSING and each.default_factory is MISSING and each.name not in raw:
            raise ValueError(f"{where}: {prefix}{each.name}: is missing")


def _mapping(where: str, field: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {field}: found {_shown(value)}; allowed: a mapping")
    return {str(key): _text(where, f"{field}.{key}", item) for key, item in value.items()}


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field}: found {_shown(value)}; allowed: text that is not empty")
    if writable(value) != value:
        raise ValueError(f"{where}: {field}: found {_shown(value)}; allowed: valid Unicode")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
