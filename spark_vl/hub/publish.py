"""Releases: what a run made → files with a card → the Hub. `prepare_…` writes and checks, `publish_…` uploads too."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from spark_vl.data.shards import check_shard, find_shards
from spark_vl.hub.cards import write_eval_results, write_model_card
from spark_vl.hub.client import Hub, HubError, check_repo_name, find_token
from spark_vl.hub.judgments import write_judgments_card
from spark_vl.hub.release import Release, ReleaseError, make_release
from spark_vl.hub.run import TrainedModel, find_model, find_run
from spark_vl.hub.space import stage_space
from spark_vl.hub.upload import Published, upload
from spark_vl.layout import JUDGMENTS, name_of
from spark_vl.report import plot_diagnostics

logger = logging.getLogger(__name__)


def publish_model(
    *,
    checkpoint: Path | str,
    repo: str,
    revision: str | None = None,
    public: bool = False,
    token_from: str | None = None,
) -> Published:
    """Publish a model of a run with its card, curves and evaluation results. Private unless `public`.

    Args:
        checkpoint: the run's folder, its `model/`, one of its checkpoints, or its `checkpoints/best`.
        repo: `ORG/NAME`, made if it is not there.
        revision: branch, made if it is not there. None: main.
        public: who can see a repository that is made.
        token_from: `env:NAME` or `file:PATH`. None: HF_TOKEN, or that of `hf auth login`.

    Raises:
        ReleaseError: there is no model of a run, or a file may not be uploaded.
        HubError: what the Hub refused. Calling again goes on from there.
    """
    release = prepare_model(checkpoint=checkpoint, repo=repo, token_from=token_from)
    return upload(release, repo=repo, revision=revision, public=public, token_from=token_from)


def prepare_model(*, checkpoint: Path | str, repo: str, token_from: str | None = None) -> Release:
    """What `publish_model` would upload; what is generated lies in the run's `release/`.

    Raises:
        ReleaseError, HubError: see `publish_model`.
    """
    check_repo_name(repo)
    model = find_model(Path(checkpoint))
    generated = _fresh(model.run / "release" / f"model-{name_of(model.step)}")
    plot_diagnostics(model.run, generated / "curves.png", model.step)
    for name, lines in (("metrics", model.metrics), ("evaluations", model.evaluations)):
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (generated / f"{name}.jsonl").write_text(text, encoding="utf-8")
    write_eval_results(model, generated / ".eval_results")
    write_model_card(
        model,
        generated / "README.md",
        model_id=repo,
        name=repo.partition("/")[2],
        base_license=_base_license(model, token_from),
    )
    title = f"Step {model.step} of {model.run.name}"
    return make_release(
        "model", title, [model.folder, generated], private=_private(model.run), replaces=("*.safetensors",)
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
    release = prepare_judgments(run=run, repo=repo)
    return upload(release, repo=repo, revision=revision, public=public, token_from=token_from)


def prepare_judgments(*, run: Path | str, repo: str) -> Release:
    """What `publish_judgments` would upload.

    Raises:
        ReleaseError: see `publish_judgments`.
    """
    check_repo_name(repo)
    folder = find_run(Path(run))
    shards = find_shards(folder / JUDGMENTS)
    if not shards:
        raise ReleaseError(
            f"{folder / JUDGMENTS}: holds no judgments; a run writes them unless logging.judgments is off"
        )
    known = {shard.path for shard in shards}
    if foreign := sorted(path for path in (folder / JUDGMENTS).rglob("*.parquet") if path not in known):
        raise ReleaseError(f"{foreign[0]}: is no file that a run writes there (CONFIG/SPLIT-FIRST-LAST-RANK.parquet)")
    rows: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    proven: set[bytes] = set()
    for shard in shards:
        try:
            rows[shard.config, shard.split] += check_shard(shard.path, proven)
        except ValueError as error:
            raise ReleaseError(str(error)) from error
        sizes[shard.config, shard.split] += shard.path.stat().st_size
    generated = _fresh(folder / "release" / JUDGMENTS)
    write_judgments_card(folder, generated / "README.md", repo=repo, rows=rows, sizes=sizes)
    return make_release(
        "dataset",
        f"Judgments of {folder.name}",
        [folder / JUDGMENTS, generated],
        private=_private(folder),
        replaces=("*/*.parquet",),
    )


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
        release = prepare_space(Path(folder), model=model, repo=repo, model_revision=model_revision)
        return upload(release, repo=repo, public=public, token_from=token_from)


def prepare_space(folder: Path, *, model: str, repo: str, model_revision: str | None = None) -> Release:
    """What `publish_space` would upload, written into the empty `folder`.

    Raises:
        HubError: a name is not `ORG/NAME`.
    """
    check_repo_name(repo)
    check_repo_name(model)
    stage_space(folder, model=model, revision=model_revision)
    return make_release("space", f"Demo of {model}", [folder], private=[Path.home(), Path.cwd()], replaces=("*.py",))


def _base_license(model: TrainedModel, token_from: str | None) -> str | None:
    """The licence that the card of the base model names. None: it has none, or cannot be asked."""
    if model.base_commit is None:
        return None
    try:
        info = Hub(find_token(token_from), model.base, "model").info()
    except HubError as error:
        logger.warning("the card will not name the licence of the base model: %s", error)
        return None
    return info and info.card_data and info.card_data.get("license")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _private(run: Path) -> list[Path]:
    return [Path.home(), Path.cwd(), run.absolute()]
