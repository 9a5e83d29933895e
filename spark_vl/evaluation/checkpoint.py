"""Evaluates a checkpoint, outside of training: on any number of rows, in bounded memory, shared out over processes, and
from where it was when it was killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spark_vl.config import ConfigError, EvalConfig, blamed_on, flat, read_config, save_config
from spark_vl.data.preferences import Preference, PreferenceSet, open_preferences
from spark_vl.data.problems import ProblemSet
from spark_vl.data.recipes import PreferenceColumns, load_recipes
from spark_vl.distributed.gather import any_process
from spark_vl.distributed.launch import start_replicas
from spark_vl.evaluation.evaluator import Evaluator
from spark_vl.evaluation.figures import Estimate
from spark_vl.evaluation.preferences import judge_preferences
from spark_vl.evaluation.prompts import in_chunks, row_order
from spark_vl.evaluation.results import Line, key, results, unique
from spark_vl.evaluation.samples import by_problem, groups_to_json
from spark_vl.families.base import ProcessedPrompt, Prompts
from spark_vl.families.registry import check_recipes
from spark_vl.log import Pace
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import BadRecordError, PromptRecord, plain_text
from spark_vl.reward import GenerativeReward
from spark_vl.rollout.engine import Sampling
from spark_vl.rollout.load import load_sampler
from spark_vl.run.jsonl import append_lines, read_lines
from spark_vl.run.paths import CONFIG
from spark_vl.run.provenance import write_recipes
from spark_vl.verifiers import VerifierPool, check_golds

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
"""All that was asked and answered. While several processes evaluate, each has a file `samples-N.jsonl` of its own."""

_ROWS_AT_ONCE = 64
"""Rows whose golds are checked together."""

_TIMEOUT_S = 24 * 3600.0
"""Processes wait for each other at the end: some have longer answers."""

_FREE = ("output", "rollout.decode_batch_size", "rollout.vllm", "rollout.openai", "verifier.workers")
"""Settings that change no answer."""
