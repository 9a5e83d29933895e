"""Rollouts in the training process, on any platform.

Each unique image goes once through the vision tower, each prompt once through the language model; the key-value cache
is then expanded to the G completions, and finished rows leave it.

Shapes: B prompts, S tokens of the longest, R = B·G rows being decoded, V words, H hidden values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from transformers import DynamicCache

from spark_vl.families.base import ModelInputs, ProcessedImage, ProcessedPrompt, Processor
from spark_vl.policy.head import sampling_logits
from spark_vl.policy.policy import Policy
from spark_vl.records import Rollout, RolloutGroup
from spark_vl.rollout.engine import Sampling, nothing


class TransformersEngine:
    """`RolloutEngine` on the policy's own modules: it needs no copy of the weights.

    Args:
        policy: sampled from, unwrapped.
        processor: names the stop and pad tokens, and decodes.
        decode_batch_size: completions decoded together; bounds the key-value cache.
        weights: makes the context in which sharded weights are gathered.
        any_process: whether its argument is true on any process. Given if each call of the policy is collective: all
            processes then make the same number of calls, and those with nothing left to decode run rows that are
            dropped.
    """

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        *,
        decode_batch_size: int,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        any_process: Callable[[bool], bool] | None = None,
    ) -> None:
        self.policy = policy
        self.processor = processor
        self.decode_batch_size = decode_batch_size
        self.weights = weights
        self.in_step = any_process is not None
        self.any_process = any_process or bool

    def sync_weights(self, policy: Policy) -> None:
        """See `RolloutEngine.sync_weights`."""
        self.policy = policy

    def close(self) -> None:
        """See `RolloutEngine.close`; there is nothing to give back."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        progress: Callable[[int], None] = nothing,
        on_group: Callable[[int, RolloutGroup], None] = nothing,
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        generator = torch.Generator(self.policy.suppressed.device).manual_seed(sampling.seed)
        was_training = self.policy.training
        self.policy.eval()  # gradient checkpointing would forbid the cache
        self.policy.use_attention("sdpa")
        try:
            with self.weights():
                # Prompts of similar length decode together, so that little is padded.
                order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
                prompts_at_once = max(1, self.decode_batch_size // n)
                groups: dict[int, RolloutGroup] = {}
                while self.any_process(bool(order)):
                    chosen, order = order[:prompts_at_once], order[prompts_at_once:]
                    batch = [prompts[i] for i in chosen]
                    done = self._generate_batch(batch, n, sampling, generator, progress)
                    groups.update(zip(chosen, done, strict=True))
                    for i in chosen:
                        on_group(i, groups[i])
        finally:
            self.policy.use_attention(self.policy.attention)
            self.policy.train(was_training)
        return [groups[i] for i in range(len(prompts))]

    def _generate_batch(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        generator: torch.Generator,
        progress: Callable[[int], None],
    ) -> list[RolloutGroup]:
        device = self.policy.suppressed.device
        rows = len(prompts) * n
        stop = torch.tensor(self.processor.stop_token_ids, device=device)

        # The last row takes what is decoded only to stay in step with other processes.
        tokens = torch.zeros(rows + 1, sampling.max_new_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows + 1, sampling.max_new_tokens, device=device)
        lengths = torch.full((rows + 1,), sampling.max_new_tokens, device=device)
        finished = torch.zeros(rows + 1, dtype=torch.bool, device=device)
        alive_R = torch.arange(max(rows, 1), device=device)
        real = bool(prompts)  # rows to drop are never beside others

        batch: Sequence[ModelInputs] = prompts or [self.processor.padding]
        each = n if prompts else 1
        logits_BV, cache, mask_BS = self.policy(partial(self._prefill, batch))
        logits_RV = logits_BV.repeat_interleave(each, dim=0)
        seen_RV: torch.Tensor | None = None  # the words of each row, which a penalty makes less likely
        if sampling.repetition_penalty != 1:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            for b, prompt in enumerate(batch):
                seen_BV[b, prompt.input_ids.to(device)] = True
            seen_RV = seen_BV.repeat_interleave(each, dim=0)
        mask_RS = mask_BS.repeat_interleave(each, dim=0)
        cache.batch_repeat_interleave(each)
        position_R = torch.tensor([p.next_position for p in batch], device=device).repeat_interleave(each)
        for step in range(sampling.max_new_tokens):
            if real:
                if seen_RV is not None:
                    logits_RV = penalized(logits_RV, seen_RV, sampling.repetition_penalty)
                token_R, logprob_R = self._sample(logits_RV, sampling, generator)
                if seen_RV is not None:
                    seen_RV.scatter_(1, token_R[:, None], True)
                tokens[alive_R, step] = token_R
                logprobs[alive_R, step] = logprob_R.to(logprobs.dtype)
                ends_R = torch.isin(token_R, stop)
                if ends_R.any():
                    lengths[alive_R[ends_R]] = step + 1
                    finished[alive_R[ends_R]] = True
                    progress(int(ends_R.sum()))
                    keep = (~ends_R).nonzero()[:, 0]
                    if len(keep) == 0:
                        real, keep = False, torch.tensor([0], device=device)
                        alive_R = torch.full_like(alive_R, rows)
                    alive_R, token_R = alive_R[keep], token_R[keep]
                    mask_RS, position_R = mask_RS[keep], position_R[keep]
                    if seen_RV is not None:
                        seen_RV = seen_RV[keep]
                    cache.batch_select_indices(keep)
            else:
                token_R = stop[:1]
            if step + 1 == sampling.max_new_tokens or not self.any_process(real):
                break
            mask_RS = torch.cat([mask_RS, mask_RS.new_ones(len(mask_RS), 1)], dim=1)
            logits_RV = self.policy(partial(self._decode, token_R, position_R, mask_RS, cache))
            position_R = position_R + 1
        progress(len(alive_R) if real else 0)

        def rollout(row: int) -> Rollout:
            length = int(lengths[row])
            ids = tuple(tokens[row, :length].tolist())
            text = self.processor.decode(ids)
            return Rollout(
                token_ids=ids,
                logprobs=tuple(logprobs[row, :length].tolist()),
                text=text,
                finish_reason="stop" if finished[row] else "length",
                answer_start=self.processor.answer_start(text),
            )

        tokens, logprobs, lengths, finished = tokens.cpu(), logprobs.cpu(), lengths.cpu(), finished.cpu()
        return [
            RolloutGroup(prompt.record, tuple(rollout(b * n + g) for g in range(n))) for b, prompt in enumerate(prompts)
        ]

    def _decode(
        self, token_R: torch.Tensor, position_R: torch.Tensor, mask_RS: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Run one more token of each row: logits [R, V]."""
        hidden_RH = self.policy.family.decode(self.policy.model, token_R, position_R, mask_RS, cache)
        return self.policy.model.lm_head(hidden_RH)

    def _prefill(self, prompts: Sequence[ModelInputs]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Run the prompts, padded on the left, once: last logits [B, V], cache, mask [B, S]."""
        device = self.policy.suppressed.device
        longest = max(len(p.input_ids) for p in prompts)
        leading = prompts[0].position_ids.shape[:-1]  # of the model family
        ids_BS = torch.full((len(prompts), longest), self.processor.pad_token_id)
        mask_BS = torch.zeros(len(prompts), longest, dtype=torch.long)
        positions_BS = torch.zeros(*leading, len(prompts), longest, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            start = longest - len(prompt.input_ids)
            ids_BS[b, start:] = prompt.input_ids
            mask_BS[b, start:] = 1
            positions_BS[..., b, start:] = prompt.position_ids
        mask_BS = mask_BS.to(device)
        hidden_BH, cache = self.policy.family.prefill(
            self.policy.model, ids_BS.to(device), positions_BS.to(device), mask_BS, *self._images(prompts)
        )
        return self.policy.model.lm_head(hidden_BH), cache, mask_BS

    def _images(self, prompts: Sequence[ModelInputs]) -> tuple[list[ProcessedImage], list[int]]:
        """Each unique image once, and for each image that the prompts show its index among them."""
        unique: dict[ProcessedImage, int] = {}
        shown = [unique.setdefault(image, len(unique)) for prompt in prompts for image in prompt.images]
        if not unique and self.in_step:  # other processes run the vision tower; of this one nothing is used
            return list(self.processor.padding.images), []
        return list(unique), shown

    def _sample(
        self, logits_RV: torch.Tensor, sampling: Sampling, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token for each row, and its log-probability."""
        logp_RV = torch.log_softmax(
            sampling_logits(logits_RV, sampling.temperature or 1.0, self.policy.suppressed), dim=-1
        )
        if sampling.temperature == 0:
            token_R = logp_RV.argmax(-1)
        else:
            probs_RV = logp_RV.exp()
            if sampling.top_p < 1:
                probs_RV = nucleus(probs_RV, sampling.top_p)
            token_R = torch.multinomial(probs_RV, 1, generator=generator)[:, 0]
        return token_R, logp_RV.gather(-1, token_R[:, None])[:, 0]


def penalized(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """[R, V] `logits`, at least float32, of which those that are `seen` [R, V] are lowered: divided by `penalty` above
    0, multiplied below (arXiv 1909.05858; transformers' `RepetitionPenaltyLogitsProcessor`)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """[R, V] `probs`, 0 outside the smallest set of words that holds `top_p` of each row (not renormalized)."""
    ordered, index = probs.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the most probable word always stays
    return torch.zeros_like(probs).scatter(-1, index, ordered)
