"""Settings from YAML files and the command line (jsonargparse): `--config run.yaml --optimizer.lr 1e-6`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from spark_vl.config import ConfigError, EvalConfig, JudgeConfig, LoraConfig, ModelConfig, TrainConfig, flat
from spark_vl.config_check import check_train_config
from spark_vl.records import did_you_mean, visible

# The text below a setting is its help on the command line.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

_RENAMED = {
    "optimizer.learning_rate": "it is called optimizer.lr",
    "rollout.rows_at_once": "it is called rollout.decode_batch_size now",
    "logging.rollouts_every": "all rollouts are in judgments/, which `spark-vl show RUN` prints; leave it out",
    "recycle.balance_labels": "true is recycle.pointwise: matched_pairs now, false is recycle.pointwise: one_per_group",
}
"""Settings of earlier versions, and what to write instead."""


class Parser(ArgumentParser):
    """Whole option names only, and errors without the page of usage that would push them off the screen."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Print `message`, which may quote files of strangers, and exit."""
        super().exit(status, message and visible(message))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `message` and exit with status 2."""
        advice = "".join(f"\n{old}: {new}" for old, new in _RENAMED.items() if _names(message, old))
        if found := re.search(r"(?:unrecognized arguments: --|(?:does not accept option|Option) ')([\w.]+)", message):
            configs = (TrainConfig(model=ModelConfig(lora=LoraConfig())), EvalConfig(), JudgeConfig())
            settings = {name for config in configs for name in flat(asdict(config))}
            names = settings | {name.rpartition(".")[2] for name in settings} | {"allow-config-change"}
            advice += did_you_mean(found[1], sorted(names))
        if found := re.search(r"key \"([\w.]+)\":\s+Expected a <class 'list'>. Got value: (\S.*)", message):
            advice += f"\nA list is written in brackets: --{found[1]} '[{found[2]}]'"
        self.exit(2, f"{self.prog}: error: {message}{advice}\n(all settings: {self.prog} --help)\n")


def _names(message: str, setting: str) -> bool:
    """Whether an error of jsonargparse is about `setting`: as an option, or as a key in a YAML file."""
    group, name = setting.split(".")
    return setting in message or f"Group {group!r} does not accept option {name!r}" in message


def add_config_arguments(parser: ArgumentParser, config_class: type) -> None:
    """Give `parser` a `--config FILE` and one option for each field of `config_class`."""
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(config_class, nested_key=None, as_group=True)


def instantiate(parser: ArgumentParser, parsed: Namespace, config_class: type) -> Any:
    """`parsed` as an instance of `config_class`.

    Raises:
        ConfigError: a YAML file has null or no mapping where it may not.
    """
    _check_filled(parsed, config_class)
    values = parser.instantiate(parsed)
    config = config_class(**{field.name: values[field.name] for field in fields(config_class)})
    _make_plain(config)
    return config


def _make_plain(config: Any) -> None:
    """Replace the number types that checked a range by plain ones: torch refuses to read others from a checkpoint."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        if is_dataclass(value):
            _make_plain(value)
        else:
            setattr(config, setting.name, _plain(value))


def _check_filled(parsed: Namespace, config_class: type, prefix: str = "") -> None:
    """Refuse what jsonargparse lets pass in YAML: null for a setting that needs a value, no mapping for a group."""
    for setting in fields(config_class):
        path, value = f"{prefix}{setting.name}", parsed[setting.name]
        if is_dataclass(setting.default_factory):
            if not isinstance(value, Namespace):
                raise ConfigError(f"{path}: is {value!r:.200}; allowed is a mapping of settings")
            _check_filled(value, setting.default_factory, f"{path}.")
        elif value is None and setting.default is not None and "None" not in str(setting.type):
            raise ConfigError(f"{path}: is null; allowed is {setting.type}")


def parse_train_config(arguments: Sequence[str]) -> TrainConfig:
    """Read a `TrainConfig` from command-line arguments such as `["--config", "run.yaml", "--seed", "1"]`.

    Raises:
        SystemExit: with the path of the field in the message, for anything that is wrong.
    """
    parser = Parser()
    add_config_arguments(parser, TrainConfig)
    parsed = parser.parse_args(arguments)
    try:
        config = instantiate(parser, parsed, TrainConfig)
        check_train_config(config)
    except ConfigError as error:
        parser.error(str(error))
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) else float(value)


def shape_for_model(arguments: Sequence[str]) -> list[str]:
    """`estimate --model 7b` as `estimate --shape 7b`: to the parser of settings, `--model` is a file with all of
    `model.path`, `model.dtype`, ..."""
    if list(arguments[:1]) != ["estimate"]:
        return list(arguments)
    return [re.sub(r"^--model(?==|$)", "--shape", argument) for argument in arguments]


def short_names(arguments: Sequence[str]) -> list[str]:
    """`eval --recipes a,b --engine vllm` as `eval --evaluation.recipes [a,b] --rollout.engine vllm`."""
    if list(arguments[:1]) != ["eval"]:
        return list(arguments)
    parts = [part for argument in arguments for part in re.split(r"(?<=^--recipes)=", argument, maxsplit=1)]
    for i, part in enumerate(parts):
        if part == "--recipes":
            parts[i] = "--evaluation.recipes"
            if i + 1 < len(parts) and not parts[i + 1].startswith("["):
                parts[i + 1] = json.dumps(parts[i + 1].split(","))
    return [re.sub(r"^--engine(?==|$)", "--rollout.engine", part) for part in parts]
