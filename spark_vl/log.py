"""What a run writes down: metrics, trackers, rollouts, and the progress that a person watches."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from spark_vl.records import JUDGMENTS, KINDS, PromptRecord, RecycledRecord, RolloutGroup, plain_text
from spark_vl.run.codec import group_to_json
from spark_vl.run.jsonl import append_lines, drop_lines_after


class Means:
    """Named means and counts that add up over packs, phases and processes. A mean is kept as a sum and a weight."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(partial(list, (0.0, 0.0)))  # a lambda could not be gathered
        self._counts: Counter[str] = Counter()

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        """Add `total`, the sum of `weight` observations."""
        self._sums[name][0] += total
        self._sums[name][1] += weight

    def count(self, name: str, n: int) -> None:
        """Count `n` more, of what is reported as a sum."""
        self._counts[name] += n

    def update(self, other: Means) -> None:
        """Add all observations of `other`."""
        for name, (total, weight) in other._sums.items():
            self.add(name, total, weight)
        for name, n in other._counts.items():
            self.count(name, n)

    def over_processes(self) -> Means:
        """The observations of all processes. A collective call."""
        merged = Means()
        for other in gather_object([self]):
            merged.update(other)
        return merged

    def result(self) -> dict[str, float]:
        """The means and counts; a mean without observations is left out."""
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        return dict(sorted((means | self._counts).items()))


def group_metrics(groups: Sequence[RolloutGroup]) -> Means:
    """Diagnostics of verified groups, per kind of prompt, as `kind/name`.

    reward, score (correctness alone), the value of each shaping term, length (tokens), entropy (nats per token: the
    mean of -log p of what was sampled), and the shares of completions that are truncated, unparsable, failed (the
    verifier timed out or raised), and of groups without variance, which have no gradient. For judgments also the
    accuracy for either label, and how often the judge says `correct` or `A`. `rollout/completions` and `rollout/tokens`
    count what was sampled, of all kinds.
    """
    means = Means()
    for group in groups:
        kind = group.record.kind
        means.count("rollout/completions", len(group.rollouts))
        means.count("rollout/tokens", sum(len(rollout.token_ids) for rollout in group.rollouts))
        means.add(f"{kind}/reward", sum(group.rewards), len(group.rewards))
        means.add(f"{kind}/zero_variance", group.zero_variance)
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
            means.add(f"{kind}/score", verdict.score)
            for name, value in verdict.shaping:
                means.add(f"{kind}/{name}", value)
            means.add(f"{kind}/length", len(rollout.token_ids))
            means.add(f"{kind}/entropy", -sum(rollout.logprobs), len(rollout.logprobs))
            means.add(f"{kind}/truncated", rollout.finish_reason == "length")
            means.add(f"{kind}/unparsable", verdict.status == "unparsable")
            means.add(f"{kind}/failed", verdict.status in ("timeout", "error"))
            if kind in JUDGMENTS:
                truth = _truth(group.record)
                means.add(f"{kind}/accuracy_{truth}", verdict.score)
                if kind == "pointwise":
                    says_first = verdict.parsed is not None and (verdict.score == 1) == (truth == "correct")
                    means.add("pointwise/says_correct", says_first)
                else:
                    means.add("pairwise/says_A", verdict.parsed == "A")
    return means


def _truth(judgment: PromptRecord) -> str:
    """What a judgment should say, in words that do not depend on the template's labels."""
    if isinstance(judgment, RecycledRecord) and judgment.kind == "pointwise":
        return "correct" if judgment.origin.quoted_correct else "incorrect"
    return judgment.gold


def add_balanced_accuracy(metrics: dict[str, float]) -> None:
    """Add `kind/balanced_accuracy` to `metrics`, the mean of its accuracies for either label: 0.5 is a coin.

    It is left out where all judgments had the same label: there, always saying it would be right.
    """
    for kind in JUDGMENTS:
        by_label = [value for name, value in metrics.items() if name.startswith(f"{kind}/accuracy_")]
        if len(by_label) == 2:
            metrics[f"{kind}/balanced_accuracy"] = sum(by_label) / len(by_label)


class Timer:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what runs inside as `phase`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def reset(self) -> dict[str, float]:
        """The seconds so far as `time/phase`, starting anew."""
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        self.seconds.clear()
        return seconds


class RunLog:
    """The files of a run, its trackers and its progress bar. Only the main process writes.

    Args:
        accelerator: its trackers are written to.
        folder: of the run; `metrics.jsonl`, `evaluations.jsonl` and `rollouts.jsonl` are written there.
        steps: of the whole run.
        resumed: step of the checkpoint from which the run goes on; later lines, of an interrupted run, are dropped.
            None: the run begins.
        heard: hears of each phase, and of each time that it gets on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        steps: int,
        resumed: int | None = None,
        heard: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.heard = heard
        self.console = Console(quiet=not accelerator.is_main_process, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=steps, completed=resumed or 0)
        self._rewards = Text()
        # A pipe or a file gets plain lines instead.
        self._live = Live(Group(self._bar, self._rewards), console=self.console) if self.console.is_terminal else None
        self._steps = steps
        if accelerator.is_main_process:
            for name in ("metrics", "evaluations", "rollouts"):
                drop_lines_after(self._path(name), -1 if resumed is None else resumed)

    def __enter__(self) -> RunLog:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Show what the step is doing."""
        count = "" if total is None else f" {done}/{total}"
        self._bar.update(self._task, description=f"{name}{count}")
        self.heard(f"{name}{count}")

    def counting(self, name: str, total: int) -> Callable[[int], None]:
        """A callable that hears of finished items and shows `name done/total`."""
        done = 0
        self.phase(name, 0, total)

        def advance(finished: int) -> None:
            nonlocal done
            done += finished
            self.phase(name, done, total)

        return advance

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a finished step."""
        self._append("metrics", {"step": step, **metrics})
        self.accelerator.log(dict(metrics), step=step)
        rewards = "  ".join(f"{kind} {metrics[f'{kind}/reward']:.2f}" for kind in KINDS if f"{kind}/reward" in metrics)
        self._bar.update(self._task, completed=step)
        self._rewards.plain = f"reward  {rewards}"
        if not self._live:
            line = f"step {step}/{self._steps}  reward: {rewards}  {metrics['time/step']:.1f} s"
            self.console.print(line, soft_wrap=True)

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Record an evaluation: name -> estimate with `value`."""
        self._append("evaluations", {"step": step, "results": results})
        self.accelerator.log({f"eval/{name}": result["value"] for name, result in results.items()}, step=step)
        figures = "  ".join(f"{name} {result['value']:.2f}" for name, result in results.items())
        self.console.print(f"evaluation after {step} steps: {figures}", soft_wrap=True)

    def rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Write the groups of a step, one a line, with the text of the prompt and all completions."""
        for group in groups:
            prompt = "\n".join(plain_text(message.content) for message in group.record.messages)
            self._append("rollouts", {"step": step, "prompt": prompt, **group_to_json(group)})

    def dump(self, step: int, groups: Sequence[RolloutGroup]) -> Path:
        """Write all of the groups of this process whose update of `step` went wrong, to study. Returns the file."""
        file = self.folder / "nonfinite" / f"step-{step:06d}.rank{self.accelerator.process_index}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        append_lines(file, map(group_to_json, groups))
        return file

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            append_lines(self._path(name), [line])
