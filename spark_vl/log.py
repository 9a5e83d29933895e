"""Metrics of a run, and where they go: files, trackers, and the progress that a person watches."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from spark_vl.records import JUDGMENTS, KINDS, PromptRecord, RecycledRecord, RolloutGroup, Verdict
from spark_vl.run.codec import group_to_json
from spark_vl.run.jsonl import append_lines, drop_lines_after
from spark_vl.run.sinks import Sink
from spark_vl.verifiers.base import SELF_JUDGE, public_name

_UNREAD_STEPS = 3
"""Steps without one readable answer to a kind of prompt, or without a gradient, after which it is said."""


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
    accuracy for either label, and how often the judge says `correct` or `A`. `pointwise/both_right`: how often it is
    right about both answers to one question, of matched pairs: a coin is in a quarter of them. `rollout/completions`
    and `rollout/tokens` count what was sampled, of all kinds.
    """
    means = Means()
    for one, other in _matched_pairs(groups):
        # Completions of the two prompts are independent: all G x G combinations.
        means.add("pointwise/both_right", fmean(one.scores) * fmean(other.scores))
    for group in groups:
        kind = group.record.kind
        means.count("rollout/completions", len(group.rollouts))
        means.count("rollout/tokens", sum(len(rollout.token_ids) for rollout in group.rollouts))
        if group.record.verifier == SELF_JUDGE:  # its figures are not of what is right, and have names of their own
            continue
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


def _matched_pairs(groups: Sequence[RolloutGroup]) -> Iterator[tuple[RolloutGroup, RolloutGroup]]:
    """The groups of pointwise prompts about a right and a wrong answer to the same question."""
    halves: dict[tuple[str, str], RolloutGroup] = {}
    for group in groups:
        record = group.record
        if isinstance(record, RecycledRecord) and record.origin.pair:
            other = halves.setdefault((record.origin.pair, record.parent_id), group)
            if other is not group:
                yield other, group


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


class Pace:
    """When another line of progress is due in a pipe or a file, where no bar can be seen."""

    def __init__(self, seconds: float = 30.0) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Whether the last line is long ago; a line is then expected, and the wait begins anew."""
        due = time.monotonic() - self._last >= self._seconds
        if due:
            self.reset()
        return due

    def reset(self) -> None:
        """A line was printed."""
        self._last = time.monotonic()


class RunLog(Sink):
    """What a run writes down and shows: metrics, evaluations, trackers, and the progress that a person watches.

    Metrics of a step are gathered here while it runs, and written by `on_metrics`. Only the main process
    writes and prints.

    Args:
        accelerator: its trackers are written to.
        folder: of the run; `metrics.jsonl` and `evaluations.jsonl` are written there.
        steps: of the whole run.
        resumed: step of the checkpoint from which the run goes on; lines of later steps, of an interrupted run, are
            dropped. None: the run begins.
        on_progress: is called with the step and what it is doing, each time that either moves on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        steps: int,
        resumed: int | None = None,
        on_progress: Callable[[int, str], None] = lambda step, phase: None,
    ) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.on_progress = on_progress
        self.console = Console(quiet=not accelerator.is_main_process, highlight=False, markup=False, emoji=False)
        self._means = Means()
        self._seconds: dict[str, float] = defaultdict(float)
        self._step = resumed or 0
        self._failed: set[str] = set()
        """Verifiers and trackers of which it has been said that they fail."""
        self._first_fault = ""
        self._steps = steps
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
        self._pace = Pace()
        self._still = 0  # steps in a row in which no group had a gradient
        self._unread: Counter[str] = Counter()  # kind → steps in a row without an answer that could be read
        if accelerator.is_main_process:
            for name in ("metrics", "evaluations"):
                drop_lines_after(self._path(name), -1 if resumed is None else resumed)

    def __enter__(self) -> RunLog:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    # ── while a step runs ──

    def begin_step(self, step: int) -> None:
        """Start gathering the metrics of `step`, counted from 1; those of a step that was abandoned are forgotten."""
        self._step, self._means = step, Means()
        self._seconds.clear()

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Show what the step is doing."""
        count = "" if total is None else f" {done}/{total}"
        self._bar.update(self._task, description=f"{name}{count}")
        self.on_progress(self._step, f"{name}{count}")
        if total and not self._live and self._pace.is_due():
            self.say(f"step {self._step}/{self._steps}  {name}{count}")

    def progress(self, name: str, total: int) -> Callable[[int], None]:
        """Start to show `name done/total`. Returns a function that is called with how many more items are done."""
        done = 0
        self.phase(name, 0, total)

        def advance(finished: int) -> None:
            nonlocal done
            done += finished
            self.phase(name, done, total)

        return advance

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds spent inside as `time/name`."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        """See `Means.add`."""
        self._means.add(name, total, weight)

    def count(self, group: str, counts: Mapping[str, int]) -> None:
        """Add to the counts called `group/name`."""
        for name, n in counts.items():
            self._means.count(f"{group}/{name}", n)

    def verified(self, groups: Sequence[RolloutGroup]) -> None:
        """Say at once, and once, which verifiers failed on every completion that they were given: learning from them
        is in vain."""
        verdicts: dict[str, list[Verdict]] = defaultdict(list)
        for group in groups:
            verdicts[group.record.verifier] += group.verdicts
        for name, given in verdicts.items():
            if name not in self._failed and all(verdict.status in ("timeout", "error") for verdict in given):
                self._failed.add(name)
                failed = f"step {self._step}: the verifier {public_name(name)} failed on all {len(given)} completions"
                self.say(f"{failed}; the first: {given[0].status}: {_one_line(given[0].detail)}")

    def end_step(self, last: Mapping[str, float], first_fault: str = "") -> dict[str, float]:
        """The metrics of the step over all processes, with `last`, which are the same on all. Collective.

        Args:
            first_fault: the first row that could not be used since the run began, and why; the step's line shows it.
        """
        self._first_fault = first_fault
        metrics = self._means.over_processes().result()
        add_balanced_accuracy(metrics)
        return metrics | dict(last) | {f"time/{name}": seconds for name, seconds in self._seconds.items()}

    # ── sink ──

    def on_groups(self, step: int, scored: Sequence[tuple[Any, RolloutGroup]]) -> None:
        """Add the diagnostics of verified groups (`group_metrics`)."""
        self._means.update(group_metrics([group for _, group in scored]))

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a finished step."""
        self._append("metrics", {"step": step, **metrics})
        self._track(lambda tracker: tracker.log(dict(metrics), step=step))
        rewards = "  ".join(f"{kind} {metrics[f'{kind}/reward']:.2f}" for kind in KINDS if f"{kind}/reward" in metrics)
        self._bar.update(self._task, completed=step)
        bad = (
            f"  quarantined: {n:.0f}, the first: {_one_line(self._first_fault)}"
            if (n := metrics.get("data/quarantined"))
            else ""
        )
        self._rewards.plain = f"reward  {rewards}{bad}"
        if not self._live:
            self.say(f"step {step}/{self._steps}  reward: {rewards}  {metrics['time/step']:.1f} s{bad}")
        self._warn_of_unread(step, metrics)
        self._warn_of_standstill(metrics)

    def _warn_of_unread(self, step: int, metrics: Mapping[str, float]) -> None:
        for kind in KINDS:
            if (share := metrics.get(f"{kind}/unparsable")) is not None:
                self._unread[kind] = self._unread[kind] + 1 if share == 1 else 0
                if self._unread[kind] == _UNREAD_STEPS:
                    self.say(
                        f"warning: no completion of a {kind} prompt had an answer that could be read, for "
                        f"{_UNREAD_STEPS} steps, so nothing is learned from them; spark-vl show {self.folder} "
                        f"--step {step} --kind {kind} prints what they say"
                    )

    def _warn_of_standstill(self, metrics: Mapping[str, float]) -> None:
        shares = [metrics[f"{kind}/zero_variance"] for kind in KINDS if f"{kind}/zero_variance" in metrics]
        failed = any(metrics.get(f"{kind}/failed") == 1 for kind in KINDS)  # which is said elsewhere
        still = shares and min(shares) == 1 and not failed
        self._still = self._still + 1 if still else 0
        if self._still == _UNREAD_STEPS:
            self.say(
                f"warning: for {_UNREAD_STEPS} steps all completions of each prompt had the same reward, so no group "
                "has a gradient and nothing is learned: the problems are too hard or too easy for the model, or too "
                "few completions are sampled (rollout.n, rollout.temperature)"
            )

    # ── beside the steps ──

    def start_trackers(self, settings: Mapping[str, Any]) -> None:
        """Start the trackers that the accelerator was made with, and tell them of the run's settings. One that cannot
        be started is reported and left out: no tracker stops a run, here or later."""
        started: list[GeneralTracker] = []
        place = self.folder.resolve()
        named = {"wandb": {"name": place.name, "dir": str(place)}, "trackio": {"name": place.name}}
        for name in self.accelerator.log_with:
            self.accelerator.log_with, self.accelerator.trackers = [name], []
            # TensorBoard makes a folder of that name in the run's.
            project = "tensorboard" if str(name) == "tensorboard" else place.parent.name or "spark-vl"
            try:
                self.accelerator.init_trackers(project, config=dict(settings), init_kwargs=named)
            except Exception as error:
                self._report(str(name), error)
            else:
                started += self.accelerator.trackers
        self.accelerator.trackers = started

    def finish_trackers(self) -> None:
        """Let the trackers write what they still hold; nothing is logged afterwards."""
        self._track(lambda tracker: tracker.finish())
        self.accelerator.trackers = []

    def _track(self, call: Callable[[GeneralTracker], None]) -> None:
        """Call each tracker. One that fails is reported once, and asked again the next time: its server may be back."""
        for tracker in self.accelerator.trackers:
            try:
                call(tracker)
            except Exception as error:
                self._report(tracker.name, error)

    def _report(self, tracker: str, error: Exception) -> None:
        if tracker not in self._failed:
            self._failed.add(tracker)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"warning: the tracker {tracker} fails: {reason:.300}; the run goes on, and metrics.jsonl has all")

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write an evaluation after `step`: name → estimate with `value`."""
        self._append("evaluations", {"step": step, "results": figures})
        values = {f"eval/{name}": figure["value"] for name, figure in figures.items()}
        self._track(lambda tracker: tracker.log(values, step=step))
        listed = "  ".join(f"{name} {figure['value']:.2f}" for name, figure in figures.items())
        self.say(f"evaluation after {step} steps: {listed}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._pace.reset()
        # Whatever it quotes: a terminal may know no more than ASCII.
        written = line.encode(self.console.encoding, "backslashreplace").decode(self.console.encoding)
        self.console.print(written, soft_wrap=True)

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


def _one_line(reason: str) -> str:
    """The beginning of a reason that may quote a row or an exception, as a terminal can show it."""
    return "".join(character if character.isprintable() else " " for character in reason[:200])
