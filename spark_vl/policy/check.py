"""Do sampling and training compute the same? Asked on the run's own model before its first update, and in each step.

Each sampled token has a log-probability under the weights that sampled it, and three computations give it:

    packed    as the update scores it: its group shares one copy of the prompt, and a mask keeps completions apart
    alone     its completion in a pack of its own, where nothing but the causal mask matters
    sampler   as the rollout engine drew it, token by token from a key-value cache

They are equal up to rounding, or the gradient is that of another distribution than the one that was sampled from. A
model whose attention ignores the mask, whose positions are off, or whose sampler lags behind trains all the same, to
nothing; so the run stops instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
from accelerate.utils import gather_object

from spark_vl.config import TrainConfig
from spark_vl.distributed.gather import each_process
from spark_vl.log import RunLog
from spark_vl.policy.batch import Scored
from spark_vl.policy.packing import PackItem, make_pack, pack_items
from spark_vl.policy.update import GAP, Updater
from spark_vl.records import RolloutGroup
from spark_vl.run.paths import LATEST, pointed
from spark_vl.run.sinks import Sink

MAX_LOGPROB_GAP = {"float32": 1e-4, "bfloat16": 5e-2}
"""`model.dtype` → bound of the mean absolute difference of log-probabilities, in nats per token."""

_PAIRS = tuple(combinations(("packed", "alone", "sampler"), 2))


class LogprobGapError(ArithmeticError):
    """Sampling and training do not compute the same log-probabilities."""


@dataclass(frozen=True)
class _Gaps:
    """How far apart the three computations are on one group."""

    means: dict[tuple[str, str], float]
    """Pair of computations → mean absolute difference, in nats per token."""
    place: str
    """Record and completion with the largest difference."""

    @property
    def largest(self) -> float:
        """Of the means; infinite where one is not a number."""
        return max(math.inf if math.isnan(mean) else mean for mean in self.means.values())


class LogprobCheck(Sink):
    """Compares the three computations before the first update, and the sampler with the update in each step.

    Args:
        config: of the run: `rollout.startup_check`, `rollout.max_logprob_gap`, `rollout.on_logprob_gap`.
        updater: holds the policy, as prepared.
        log: is told what was found.
        checkpoints: folder of the run's checkpoints, to name the last one.
    """

    def __init__(self, config: TrainConfig, updater: Updater, log: RunLog, checkpoints: Path) -> None:
        settings = config.rollout
        self.updater, self.log, self.checkpoints = updater, log, checkpoints
        self.max_gap = settings.max_logprob_gap or MAX_LOGPROB_GAP[config.model.dtype]
        self.stops = settings.on_logprob_gap == "stop"
        self._due = settings.startup_check
        # Dropout makes the update's log-probabilities differ from the sampler's, by an amount that only the user knows.
        dropout = config.model.lora is not None and config.model.lora.dropout > 0
        self._watches = settings.max_logprob_gap is not None or not dropout

    def __call__(self, step: int, scored: Sequence[Scored]) -> None:
        """Check one group of each process, once: before the first update, or the first one after a resume. Collective.

        Args:
            step: that is about to update.
            scored: groups of this process, sampled from the weights as they are; none on all processes: it is left to
                the next step.

        Raises:
            LogprobGapError: two computations differ by more than the bound on any process; on all processes.
        """
        if not self._due:
            return
        self.log.phase("checking")
        found = [gaps for gaps in gather_object([self._measure(scored)]) if gaps]
        if not found:
            return
        self._due = False
        worst = max(found, key=lambda gaps: gaps.largest)
        listed = ", ".join(f"{a} and {b} by {worst.means[a, b]:.2g}" for a, b in _PAIRS)
        if worst.largest > self.max_gap:
            raise LogprobGapError(
                f"before the update of step {step}, log-probabilities that should be equal differ: {listed} nats per "
                f"token in the mean, most in {worst.place}; allowed are {self.max_gap:g} (rollout.max_logprob_gap). "
                f"{_meaning(*(not worst.means[pair] <= self.max_gap for pair in _PAIRS))}. To go on without this "
                "check: rollout.startup_check: false"
            )
        self.log.say(f"startup check passed: {listed} nats per token; allowed are {self.max_gap:g}")

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stop or warn where the sampler and the update of `step` were too far apart.

        Raises:
            LogprobGapError: they were, and `rollout.on_logprob_gap` is `stop`; on all processes, as the metrics are.
        """
        # No metric: no pass was real. Not a number: the updater has skipped the update, and counts.
        if not self._watches or not metrics.get(GAP, 0.0) > self.max_gap:
            return
        found = (
            f"step {step}: {GAP} is {metrics[GAP]:.2g} nats per token; allowed are {self.max_gap:g} "
            "(rollout.max_logprob_gap): sampling and training do not compute the same"
        )
        if not self.stops:
            self.log.say(f"warning: {found}")
            return
        last = pointed(self.checkpoints, LATEST)
        raise LogprobGapError(
            f"{found}; {f'the last checkpoint is {last}' if last else 'there is no checkpoint yet'}. To go on "
            "all the same: --resume auto with rollout.on_logprob_gap: warn, or with a larger bound"
        )

    def _measure(self, scored: Sequence[Scored]) -> _Gaps | None:
        """The gaps of one group of this process, or None if it has none. Every process makes the same passes."""
        updater, padding = self.updater, self.updater.processor.padding
        packs, alone = [], []
        if scored:
            # A group with images if there is one, since their positions are the hardest; of these the one whose tokens
            # were the least certain: where each has a probability of 1, nothing can differ.
            prompt, group = min(scored, key=lambda pair: (not pair[0].images, _mean_logprob(pair[1])))
            completions = [rollout.token_ids for rollout in group.rollouts]
            whole = PackItem(prompt, completions, range(len(completions)))
            packs = pack_items([whole], tokens_per_pack=updater.settings.tokens_per_pack, padding=padding)
            alone = [make_pack([PackItem(prompt, [ids], [i])], padding=padding) for i, ids in enumerate(completions)]
        passes = [*packs, *alone]
        most = max(each_process(updater.accelerator, len(passes)))
        logprobs = updater.score([*passes, *[None] * (most - len(passes))])
        if not scored:
            return None
        # A group that was cut may lie in its packs in another order; tokens of one completion stay together.
        in_order = torch.cat([pack.row_N for pack in packs]).argsort(stable=True)
        scores = {
            "packed": torch.cat(logprobs[: len(packs)]).cpu()[in_order],
            "alone": torch.cat(logprobs[len(packs) : len(passes)]).cpu(),
            "sampler": torch.tensor([value for rollout in group.rollouts for value in rollout.logprobs]),
        }
        gaps = {(a, b): (scores[a] - scores[b]).abs() for a, b in _PAIRS}
        largest = torch.stack([*gaps.values()]).amax(0).split([len(ids) for ids in completions])
        worst = int(torch.stack([of_one.mean() for of_one in largest]).argmax())  # NaN counts as the largest
        return _Gaps(
            {pair: float(gap.mean()) for pair, gap in gaps.items()},
            f"completion {worst + 1} of {len(completions)} of {prompt.record.id}",
        )


def _mean_logprob(group: RolloutGroup) -> float:
    """Of the tokens of a group, as the sampler gave it."""
    return fmean(value for rollout in group.rollouts for value in rollout.logprobs)


def _meaning(packed_alone: bool, packed_sampler: bool, alone_sampler: bool) -> str:
    """What it means that these pairs differ."""
    if packed_alone and not alone_sampler:
        return "packed ≠ alone = sampler: the model ignores the mask or the positions of packed groups"
    if not packed_alone:
        return (
            "packed = alone ≠ sampler: sampling and training do not compute the same; the suspects are the positions "
            "and the mask of decoding, temperature and suppressed tokens, and weights that the sampler does not have"
        )
    if not packed_sampler:
        return "packed = sampler ≠ alone: the model scores a completion by itself otherwise than it samples it"
    return (
        "packed ≠ alone ≠ sampler: the model's forward pass depends on more than its input, or both packing and "
        "sampling are wrong"
    )
