"""What types alone cannot check: one setting against another, and names against what exists."""

from __future__ import annotations

import re
from importlib.util import find_spec
from math import inf
from typing import Any
from urllib.parse import urlsplit

from spark_vl.config import (
    ConfigError,
    EvalConfig,
    EvaluationConfig,
    JudgeConfig,
    ModelConfig,
    OpenAIConfig,
    RecycleConfig,
    RolloutConfig,
    TrainConfig,
    VLLMConfig,
    blamed_on,
    read_token,
)
from spark_vl.records import KINDS

_TRACKERS = {
    "aim": ["aim"],
    "clearml": ["clearml"],
    "comet_ml": ["comet_ml"],
    "dvclive": ["dvclive"],
    "mlflow": ["mlflow"],
    "swanlab": ["swanlab"],
    "tensorboard": ["tensorboard", "tensorboardX"],
    "trackio": ["trackio"],
    "wandb": ["wandb"],
}
"""Trackers that Accelerate knows → packages of which one must be installed."""


def check_train_config(config: TrainConfig) -> None:
    """Check what types alone cannot: one field against another, and names against what exists.

    Raises:
        ConfigError: naming the field, what was found and what is allowed.
    """
    if not config.data.recipes:
        raise ConfigError("data.recipes: is empty; name at least one recipe (`spark-vl recipes` lists them)")
    _check_kind_table("objective.weights", config.objective.weights, 0.0)
    _check_kind_table("objective.refill_rounds", config.objective.refill_rounds, 0)
    if missing := [k for k in KINDS if k not in config.objective.weights]:
        raise ConfigError(f"objective.weights: lacks {', '.join(missing)}; all of {', '.join(KINDS)} are needed")
    check_pixels(config.model)
    _check_baseline(config.evaluation)
    _check_trackers(config.logging.trackers)
    if config.checkpoint.keep_best and not config.evaluation.recipes:
        raise ConfigError("checkpoint.keep_best: there is no evaluation to find the best in; set evaluation.recipes")
    if config.publish.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.publish.repo):
        raise ConfigError(f"publish.repo: is {config.publish.repo!r}; allowed is ORG/NAME or USER/NAME")
    if config.rollout.n < 2:
        raise ConfigError("rollout.n: is 1; a group needs at least 2 completions to compare")
    if config.rollout.engine == "openai":
        raise ConfigError(
            "rollout.engine: is openai, but training needs transformers or vllm: a server of others has neither the "
            "policy's weights nor its tokens; it can be asked by `spark-vl eval` and `spark-vl judge`"
        )
    _check_engine(config.rollout)
    if config.self_judge.average is not None and config.rollout.engine != "transformers":
        raise ConfigError(
            f"self_judge.average: is {config.self_judge.average}, but rollout.engine: {config.rollout.engine} has the "
            "policy's weights alone; set it to null, or take rollout.engine: transformers"
        )
    if config.rollout.top_p < 1:
        raise ConfigError(
            f"rollout.top_p: is {config.rollout.top_p}, but training needs 1: log-probabilities and ratios are of "
            "the whole distribution, and completions from a part of it would bias the gradient; for less random "
            "completions lower rollout.temperature, which both know of, and keep top_p for `spark-vl eval`"
        )
    if config.optimizer.updates_per_batch > config.data.prompts_per_step:
        raise ConfigError(
            f"optimizer.updates_per_batch: is {config.optimizer.updates_per_batch}, more than "
            f"data.prompts_per_step ({config.data.prompts_per_step}): some updates would have no group"
        )
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: is {config.optimizer.betas}; allowed are two numbers in [0, 1)")
    _check_batch(config.recycle)
    warmup = config.optimizer.warmup_updates
    if warmup >= 1 and warmup != int(warmup):
        raise ConfigError(
            f"optimizer.warmup_updates: is {warmup}; allowed are whole numbers, or a share of all updates below 1"
        )
    if config.optimizer.min_lr_ratio and config.optimizer.schedule != "cosine":
        raise ConfigError(
            f"optimizer.min_lr_ratio: is {config.optimizer.min_lr_ratio}, but only schedule: cosine ends there; "
            f"optimizer.schedule is {config.optimizer.schedule}"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if config.optimizer.tokens_per_pack < longest:
        raise ConfigError(
            f"optimizer.tokens_per_pack: is {config.optimizer.tokens_per_pack}, less than the longest prompt with one "
            f"completion ({longest} = data.max_prompt_tokens + rollout.max_new_tokens)"
        )


def _check_engine(rollout: RolloutConfig) -> None:
    if rollout.engine == "vllm":
        _check_vllm(rollout.vllm)
    elif rollout.engine == "openai":
        _check_openai(rollout.openai)


def _check_openai(settings: OpenAIConfig) -> None:
    if settings.base_url is None:
        raise ConfigError(
            "rollout.openai.base_url: is null; name the server, up to and with its version, e.g. "
            "http://localhost:8000/v1"
        )
    with blamed_on("rollout.openai.base_url"):
        url = urlsplit(settings.base_url)
        _ = url.port  # raises where it is no number
    if "@" in url.netloc or url.query:  # not repeated: it may be a secret
        raise ConfigError(
            "rollout.openai.base_url: holds a user, password or query, which would be written down; put a key where "
            "rollout.openai.token_from names it"
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"rollout.openai.base_url: found {settings.base_url!r}; allowed: http://HOST:PORT/v1")
    if settings.token_from:
        read_token(settings.token_from, "rollout.openai.token_from")


def _check_vllm(settings: VLLMConfig) -> None:
    if settings.mode == "server" and not settings.servers:
        raise ConfigError(
            "rollout.vllm.servers: is empty; name the servers, e.g. [http://localhost:8000], which spark-vl "
            "serve-rollouts starts; or set rollout.vllm.mode: colocate"
        )
    for url in settings.servers:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"rollout.vllm.servers: found {url!r}; allowed: http://HOST:PORT")
    if settings.mode == "colocate":
        check_vllm_installed()


def check_vllm_installed() -> None:
    """Raises a ConfigError unless vLLM is installed."""
    if not find_spec("vllm"):
        raise ConfigError("rollout.engine: vllm is not installed: pip install 'spark-vl[vllm]'")


def _check_batch(recycle: RecycleConfig) -> None:
    twice = recycle.schedule == "sequential" and recycle.judge_reflections
    most = recycle.max_judge * (2 if twice else 1) + recycle.max_reflection
    if recycle.batch is not None and recycle.batch < most:
        raise ConfigError(
            f"recycle.batch: is {recycle.batch}, and up to {most} prompts are recycled in a step, so ever more would "
            f"wait; set it to {most} or more, or lower recycle.max_judge and recycle.max_reflection"
        )


def check_eval_config(config: EvalConfig) -> None:
    """As `check_train_config`."""
    if not config.evaluation.recipes:
        raise ConfigError("evaluation.recipes: is empty; name at least one recipe (`spark-vl recipes` lists them)")
    check_pixels(config.model)
    _check_engine(config.rollout)
    _check_baseline(config.evaluation)


def _check_baseline(evaluation: EvaluationConfig) -> None:
    if evaluation.reflection_rounds and not evaluation.samples:
        raise ConfigError(
            "evaluation.samples: is 0, but test-time reflection is reported beside a majority of samples that take as "
            "many tokens; set it, or evaluation.reflection_rounds: 0"
        )


def check_judge_config(config: JudgeConfig) -> None:
    """As `check_train_config`."""
    check_pixels(config.model)
    _check_engine(config.rollout)
    if config.rollout.engine == "openai" and config.probability == "labels":
        raise ConfigError(
            "probability: is labels, but with rollout.engine: openai the weights that score them are at the server; "
            "set it to votes, with samples: 8 or so for graded ones"
        )


def check_pixels(model: ModelConfig) -> None:
    """Check the bounds of image sizes. Raises as `check_train_config` does."""
    if model.min_pixels > model.max_pixels:
        raise ConfigError(f"model.min_pixels: is {model.min_pixels}, above model.max_pixels ({model.max_pixels})")


def _check_kind_table(path: str, table: dict[str, Any], least: float) -> None:
    for kind, value in table.items():
        if kind not in KINDS:
            raise ConfigError(f"{path}: {kind!r} is not a kind of prompt; allowed are {', '.join(KINDS)}")
        if not least <= value < inf:
            raise ConfigError(f"{path}.{kind}: is {value}; allowed are finite numbers from {least}")


def _check_trackers(names: list[str]) -> None:
    for name in names:
        if name not in _TRACKERS:
            raise ConfigError(f"logging.trackers: found {name!r}; allowed: {', '.join(_TRACKERS)}")
        if not any(map(find_spec, _TRACKERS[name])):
            raise ConfigError(f"logging.trackers: {name} is not installed: pip install {_TRACKERS[name][0]}")
