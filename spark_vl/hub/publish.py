"""Releases: what a run made → files with a card → the Hub. `prepare_…` writes and checks, `publish_…` uploads too."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spark_vl.data.judgments import CONFIGS
from spark_vl.hub.benchmarks import read_benchmarks
from spark_vl.hub.cards import BASE_LICENSE, write_eval_results, write_model_card
from spark_vl.hub.client import Hub, HubError, check_repo_name, find_token
from spark_vl.hub.judgments import write_judgments_card
from spark_vl.hub.release import Release, ReleaseError, Secrets, digest_of, files_of, make_release
from spark_vl.hub.run import TrainedModel, find_model, read_from, run_of
from spark_vl.hub.space import stage_space
from spark_vl.hub.upload import Published, upload
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.report import plot_diagnostics
from spark_vl.run.paths import JUDGMENTS
from spark_vl.run.shards import ShardError, check_shard, find_shards

logger = logging.getLogger(__name__)

_OF_MODELS = re.compile(
    r"adapter/adapter_(model\.safetensors|config\.json)|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(metrics|evaluations)\.jsonl|\.eval_results/.+\.yaml"
)
_OF_JUDGMENTS = re.compile(rf"({'|'.join(CONFIGS)})/(train|test)-[^/]+\.parquet")
"""All that the card's patterns would load."""
_OF_SPACES = re.compile(r"app\.py|spark_vl/.+\.py")

_OF_THE_RUN = ("id", "parent_id", "recipe", "license", "verifier", "settings", "template", "model", "model_revision")
"""Columns that hold what a run calls things."""


def publish_model(
    *,
    checkpoint: Path | str,
    repo: str,
    evaluation: Path | str | None = None,
    revision: str | None = None,
    public: bool = False,
    token_from: str | None = None,
) -> Published:
    """Publish a model of a run with its card, curves and evaluation results. Private unless `public`.

    Args:
        checkpoint: the run's folder, its `model/`, one of its checkpoints, or its `checkpoints/best`.
        repo: `ORG/NAME`, made if it is not there.
        evaluation: folder of an evaluation of these weights by `spark-vl eval`, whose figures the card shows.
        revision: branch, made if it is not there. None: main.
        public: who can see a repository that is made.
        token_from: `env:NAME` or `file:PATH`. None: HF_TOKEN, or that of `hf auth login`.

    Raises:
        ReleaseError: there is no model of a run, the evaluation is of another one, or a file may not be uploaded.
        HubError: what the Hub refused. Calling again continues from there.
    """
    with TemporaryDirectory() as folder:
        release = prepare_model(
            Path(folder), checkpoint=checkpoint, repo=repo, evaluation=evaluation, token_from=token_from
        )
        return upload(release, repo=repo, revision=revision, public=public, token_from=token_from)


def prepare_model(
    folder: Path,
    *,
    checkpoint: Path | str,
    repo: str,
    evaluation: Path | str | None = None,
    token_from: str | None = None,
    dry_run: bool = False,
) -> Release:
    """What `publish_model` would upload.

    Args:
        folder: an empty one, for what is generated.
        dry_run: warn, and continue, where the Hub cannot be asked for the license of the base model.

    Raises:
        ReleaseError, HubError: see `publish_model`.
    """
    check_repo_name(repo)
    with read_from(Path(checkpoint)):
        model = find_model(Path(checkpoint))
        if evaluation is not None:
            model = replace(model, benchmarks=read_benchmarks(Path(evaluation), model.folder))
        plot_diagnostics(model.run, folder / "curves.png", model.step)
        for name, lines in (("metrics", model.metrics), ("evaluations", model.evaluations)):
            if lines:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        write_eval_results(model, folder / ".eval_results")
        base_license = None
        try:
            base_license = _base_license(model, token_from)
        except HubError as error:
            if not dry_run:
                raise
            logger.warning("the license of the base model is not in this card: %s", error)
        name = repo.partition("/")[2]
        write_model_card(model, folder / "README.md", model_id=repo, name=name, base_license=base_license)
    return make_release(
        "model",
        f"Step {model.step} of {model.run.name}",
        files_of(model.folder, folder),
        secrets=_secrets(model.run, token_from),
        replaces=_OF_MODELS,
    )


def publish_judgments(
    *,
    run: Path | str,
    repo: str,
    revision: str | None = None,
    public: bool = False,
    token_from: str | None = None,
) -> Published:
    """Publish a run's recycled judgments and rollouts as a dataset with its card. Private unless `public`.

    Every image of every row is checked to be pixels that the kit's own loader read.

    Args:
        run: folder of the run (or one that `spark-vl recycle` wrote).
        repo, revision, public, token_from: see `publish_model`.

    Raises:
        ReleaseError: the run has no judgments, or a row may not be uploaded; its id is named.
        HubError: see `publish_model`.
    """
    with TemporaryDirectory() as folder:
        release = prepare_judgments(Path(folder), run=run, repo=repo, token_from=token_from)
        return upload(release, repo=repo, revision=revision, public=public, token_from=token_from)


def prepare_judgments(folder: Path, *, run: Path | str, repo: str, token_from: str | None = None) -> Release:
    """What `publish_judgments` would upload: the shards that were checked, and none that a run has written since.

    Args:
        folder: an empty one, for the card.

    Raises:
        ReleaseError: see `publish_judgments`.
    """
    check_repo_name(repo)
    run = run_of(Path(run))
    secrets = _secrets(run, token_from)
    rows: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    proven: set[bytes] = set()
    digests: dict[str, str] = {}
    try:
        shards = find_shards(run / JUDGMENTS)
        if not shards:
            raise ReleaseError(
                f"{run / JUDGMENTS}: holds no judgments; a run writes them unless logging.judgments is off"
            )
        known = {shard.path for shard in shards}
        if foreign := sorted(path for path in (run / JUDGMENTS).rglob("*.parquet") if path not in known):
            raise ReleaseError(f"{foreign[0]}: is not a file that a run writes (CONFIG/SPLIT-FIRST-LAST-RANK.parquet)")
        for shard in shards:
            if shard.path.resolve() != shard.path:
                raise ReleaseError(f"{shard.path}: lies behind a symbolic link; only regular files are uploaded")
        for shard in shards:
            digests[f"{shard.config}/{shard.path.name}"] = digest_of(shard.path)
            rows[shard.config, shard.split] += check_shard(shard.path, proven, lambda row: _fault(row, secrets))
            sizes[shard.config, shard.split] += shard.path.stat().st_size
        with read_from(run):
            write_judgments_card(run, folder / "README.md", repo=repo, shards=shards, rows=rows, sizes=sizes)
    except ShardError as error:
        raise ReleaseError(str(error)) from error
    release = make_release(
        "dataset",
        f"Judgments of {run.name}",
        {f"{shard.config}/{shard.path.name}": shard.path for shard in shards} | files_of(folder),
        secrets=secrets,
        replaces=_OF_JUDGMENTS,
    )
    for file in release.files:
        if file.sha256 != digests.get(file.path, file.sha256):
            raise ReleaseError(f"{file.file}: has changed since it was looked through; publish again")
    return release


def publish_space(
    *,
    model: str,
    repo: str,
    model_revision: str | None = None,
    public: bool = False,
    token_from: str | None = None,
) -> Published:
    """Publish a demo of a published model as a Space. Private unless `public`.

    Args:
        model: `ORG/NAME` of the model's repository, which the Space loads.
        repo: `ORG/NAME` of the Space.
        model_revision: branch, tag or commit of the model. None: main.
        public, token_from: see `publish_model`.

    Raises:
        HubError: see `publish_model`.
    """
    with TemporaryDirectory() as folder:
        release = prepare_space(
            Path(folder), model=model, repo=repo, model_revision=model_revision, token_from=token_from
        )
        check_model_is_there(model, model_revision, token_from)
        return upload(release, repo=repo, public=public, token_from=token_from)


def prepare_space(
    folder: Path, *, model: str, repo: str, model_revision: str | None = None, token_from: str | None = None
) -> Release:
    """What `publish_space` would upload, written into the empty `folder`.

    Raises:
        HubError: a name is not `ORG/NAME`.
    """
    check_repo_name(repo)
    check_repo_name(model, "--model")
    stage_space(folder, model=model, revision=model_revision)
    secrets = Secrets([Path.home(), Path.cwd()], token_from)
    return make_release("space", f"Demo of {model}", files_of(folder), secrets=secrets, replaces=_OF_SPACES)


def check_model_is_there(model: str, revision: str | None, token_from: str | None) -> None:
    """Raises:
    HubError: the Hub has no such model, or the model lacks the prompts that a Space uses, or a vision tower.
    """
    info = Hub(find_token(token_from), model, "model").info(revision)
    if info is None:
        raise HubError(f"--model: there is no model {model!r} that the token can see; publish it first")
    if PROMPTS_FILE not in [sibling.rfilename for sibling in info.siblings or ()]:
        raise HubError(f"--model: {model!r} has no {PROMPTS_FILE}, so it was not published by spark-vl")
    if info.card_data and info.card_data.get("pipeline_tag") == "text-generation":
        raise HubError(f"--model: {model!r} is a text-generation model; the page of a Space asks about an image")


def _base_license(model: TrainedModel, token_from: str | None) -> dict[str, str] | None:
    """What the card of the base model says of its license. None: it says nothing, or the
    card is gone."""
    if model.base_commit is None:
        return None
    info = Hub(find_token(token_from), model.base, "model").info()
    said = {name: info.card_data.get(name) for name in BASE_LICENSE} if info and info.card_data else {}
    return {name: text for name, text in said.items() if text} or None


def _fault(row: Mapping[str, Any], secrets: Secrets) -> str | None:
    """Why a row must not be published; None: it may be. Paths are searched for only where a run writes them: the
    words of people and models may well contain one."""
    for column, value in row.items():
        text = "\n".join(_texts(value))
        if found := secrets.token_in(text) or (column in _OF_THE_RUN and secrets.path_in(text)):
            return f"{column!r} holds {found}"
    return None


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for item in value.values():
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


def _secrets(run: Path, token_from: str | None) -> Secrets:
    return Secrets([Path.home(), Path.cwd(), run], token_from)
