"""`GenerativeReward`: a trained model that is asked whether an answer is right, or which of two is.

A judgment is sampled like any completion: the model reasons and boxes a label. Its probability is that of the label
behind this reasoning (`labels.py`) or, over several samples, the share of votes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast, overload

from spark_vl.answers import match_label
from spark_vl.config import ConfigError, JudgeConfig, ModelConfig, OpenAIConfig, PromptConfig, VLLMConfig
from spark_vl.config_check import check_judge_config
from spark_vl.families.base import ProcessedPrompt, Processor, Prompts
from spark_vl.families.registry import find_family
from spark_vl.policy.policy import Policy
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import Rendered
from spark_vl.records import BadRecordError, Content, PromptRecord, RecycledKind, Rollout, RolloutGroup
from spark_vl.reward.asked import Answer, Image, Question, as_content
from spark_vl.reward.judgment import Judgment, Ranking, Reply, pairs, ranked, ranked_by_pairs
from spark_vl.reward.labels import alternatives, label_probabilities
from spark_vl.reward.trl import JudgeReward
from spark_vl.rollout.engine import PromptsRefusedError, Sampler, Sampling
from spark_vl.rollout.load import Loaded, load_sampler
from spark_vl.run.paths import model_folder
from spark_vl.run.trained import find_templater, saved_limits

Asked = tuple[ProcessedPrompt, ...]
"""The prompts of one judgment, one for each order. `gold` of their records is the label in favor."""

Images = Sequence[Image] | None

By = Literal["pairwise", "pointwise"]


class GenerativeReward:
    """A model as a judge.

        judge = GenerativeReward.from_pretrained("runs/digits-spark/model")
        judge.pointwise("Which digit is larger?", ["picture.png"], "7").probability
        judge.pairwise("Which digit is larger?", ["picture.png"], "7", "3").probability
        judge.best_of("Which digit is larger?", ["picture.png"], ["7", "3", "5"])

    Each of these takes one question, or a *list* of questions; the other arguments are lists of the same length then,
    and so is the result. A tuple is one question or answer, its texts and images in reading order.

    A judge is shown an answer as it is given. Models are trained to judge final answers, such as `7`, unless
    `recycle.judge_sees` said otherwise.

    `close` gives back what the engine holds.

    Args:
        engine: samples the judgments.
        processor: makes the prompts that `engine` takes; with a `policy`, the processor of that model.
        templater: words the prompts, as the model was trained on them.
        sampling: how judgments are drawn.
        samples: judgments of each answer, and of each order of a pair; with a temperature of 0 more than one are alike.
        policy: the model, which scores labels at its own temperature. None: a probability is a share of the votes.
        pointwise_template, pairwise_template: names of the templates to ask with. None: the first pointwise one that
            asks for Yes or No, or, if none does, the first; the first pairwise one.

    Raises:
        ValueError: there is no template of that name, or `samples` is less than 1.
    """

    def __init__(
        self,
        engine: Sampler,
        processor: Prompts,
        templater: Templater,
        *,
        sampling: Sampling,
        samples: int = 1,
        policy: Policy | None = None,
        pointwise_template: str | None = None,
        pairwise_template: str | None = None,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples: found {samples}; allowed: 1 or more")
        self.engine, self.processor, self.templater = engine, processor, templater
        self.sampling, self.samples, self.policy = sampling, samples, policy
        self.pointwise_template = _find_template(templater, "pointwise", pointwise_template)
        self.pairwise_template = _find_template(templater, "pairwise", pairwise_template)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        revision: str | None = None,
        engine: Literal["transformers", "vllm", "openai"] | Sampler = "transformers",
        vllm: VLLMConfig | None = None,
        openai: OpenAIConfig | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        probability: Literal["labels", "votes"] = "labels",
        samples: int = 1,
        max_new_tokens: int | None = None,
        prompts: PromptConfig | None = None,
    ) -> GenerativeReward:
        """The model in a folder (a run's, too) or on the Hub, on a GPU if there is one.

        It is asked in the words that it was trained on, and sees images as finely as then, if a run of this kit has
        saved it (`spark_prompts.json`, `spark_training.json`). A server of `openai` sees them as it does, and may have
        another model: `path` says in whose words it is asked.

        Args:
            engine: by name, or a sampler that samples from the same model.
            vllm, openai: settings of the engines of these names; `openai` needs a `base_url`.
            dtype: of the weights. None: the one that the model was trained in or, where that is not known, bfloat16.
            probability, samples: see `JudgeConfig`. With `votes` and a sampler of its own no weights are loaded here;
                with `openai` none are, and `votes` is what is left.
            max_new_tokens: of a judgment. None: as many as in training or, where that is not known, 768.
            prompts: other words to ask in.

        Raises:
            ConfigError: the model or its prompts cannot be used, or not with this engine.
            EngineError: vLLM does not start.
        """
        model = model_folder(path)
        config = JudgeConfig(
            model=ModelConfig(path=model, revision=revision),
            prompts=prompts or PromptConfig(),
            probability=probability,
            samples=samples,
        )
        for setting, value in saved_limits(model, revision).items():
            group, _, name = setting.rpartition(".")
            setattr(vars(config)[group] if group else config, name, value)
        if dtype is not None:
            config.model.dtype = dtype
        if max_new_tokens is not None:
            config.rollout.max_new_tokens = max_new_tokens
        config.rollout.vllm, config.rollout.openai = vllm or VLLMConfig(), openai or OpenAIConfig()
        if not isinstance(engine, str):
            return cls.from_config(config, engine)
        if engine not in ("transformers", "vllm", "openai"):
            raise ConfigError(f"engine: found {engine!r}; allowed: transformers, vllm, openai, or a Sampler")
        config.rollout.engine = engine
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: JudgeConfig, engine: Sampler | None = None) -> GenerativeReward:
        """The judge that `config` describes.

        Args:
            engine: samples from the same model. None: the engine of `config.rollout`.

        Raises:
            ConfigError, EngineError: see `from_pretrained`.
        """
        if engine is None:
            check_judge_config(config)
        elsewhere = engine is None and config.rollout.engine == "openai"
        templater = find_templater(
            config.prompts, config.model, None if elsewhere else find_family(config.model).reserved
        )
        try:  # before the weights are loaded
            names = {
                "pointwise_template": _find_template(templater, "pointwise", config.pointwise_template),
                "pairwise_template": _find_template(templater, "pairwise", config.pairwise_template),
            }
        except ValueError as error:
            raise ConfigError(str(error)) from error
        loaded = _load(config, engine)
        rollout, samples = config.rollout, config.samples
        temperature = rollout.temperature if samples > 1 else 0.0
        return cls(
            loaded.sampler,
            loaded.prompts,
            templater,
            sampling=Sampling(temperature, rollout.top_p, rollout.max_new_tokens, config.seed),
            samples=samples,
            policy=loaded.policy if config.probability == "labels" else None,
            **names,
        )

    def close(self) -> None:
        """Give back what the engine holds."""
        self.engine.close()

    # ── what is asked ──

    @overload
    def pointwise(self, question: Question, images: Images, answer: Answer) -> Judgment: ...
    @overload
    def pointwise(
        self, question: list[Any], images: Sequence[Images] | None, answer: Sequence[Answer]
    ) -> list[Judgment]: ...
    def pointwise(self, question: Any, images: Any, answer: Any) -> Any:
        """Whether `answer` is correct: `Judgment.probability`.

        Args:
            question: a text, a tuple of texts and images, or a record; or a list of these.
            images: of a question that is a text; None: it has none.
            answer: as it is to be shown.

        Raises:
            BadRecordError: the prompt is too long, or an image cannot be used.
            ValueError: question and images do not go together, or the lists differ in length.
        """
        rows = _rows(question, images, answer)
        judged = self._judge([self.ask_pointwise(*row) for row in rows])
        return judged if isinstance(question, list) else judged[0]

    @overload
    def pairwise(self, question: Question, images: Images, a: Answer, b: Answer) -> Judgment: ...
    @overload
    def pairwise(
        self, question: list[Any], images: Sequence[Images] | None, a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Judgment]: ...
    def pairwise(self, question: Any, images: Any, a: Any, b: Any) -> Any:
        """Whether `a` is better than `b`, asked in both orders: `Judgment.probability` is their mean.

        Args:
            question, images: see `pointwise`.

        Raises:
            BadRecordError, ValueError: see `pointwise`.
        """
        rows = _rows(question, images, a, b)
        judged = self._judge([self.ask_pairwise(*row) for row in rows])
        return judged if isinstance(question, list) else judged[0]

    @overload
    def rank(
        self,
        question: Question,
        images: Images,
        answers: Sequence[Answer],
        *,
        by: By = ...,
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        question: list[Any],
        images: Sequence[Images] | None,
        answers: Sequence[Sequence[Answer]],
        *,
        by: By = ...,
    ) -> list[Ranking]: ...
    def rank(self, question: Any, images: Any, answers: Any, *, by: By = "pairwise") -> Any:
        """Answers to one question, the best first.

        Args:
            question, images: see `pointwise`.
            answers: one or more.
            by: `pairwise`: each is compared with each, n·(n-1) prompts. `pointwise`: each is judged alone, n prompts.

        Raises:
            BadRecordError, ValueError: see `pointwise`; there are no answers.
        """
        rows = _rows(question, images, answers)
        asked: list[Asked] = []
        for q, shown, given in rows:
            if not given:
                raise ValueError("answers: found none; allowed: one or more")
            if by == "pairwise":
                asked += [self.ask_pairwise(q, shown, given[i], given[j]) for i, j in pairs(len(given))]
            else:
                asked += [self.ask_pointwise(q, shown, answer) for answer in given]
        judged = iter(self._judge(asked))
        rankings = []
        for _, _, given in rows:
            n = len(given)
            if by == "pairwise":
                rankings.append(ranked_by_pairs(n, [next(judged) for _ in pairs(n)]))
            else:
                rankings.append(ranked([next(judged).probability for _ in given]))
        return rankings if isinstance(question, list) else rankings[0]

    @overload
    def best_of(
        self,
        question: Question,
        images: Images,
        answers: Sequence[Answer],
        *,
        by: By = ...,
    ) -> int | None: ...
    @overload
    def best_of(
        self,
        question: list[Any],
        images: Sequence[Images] | None,
        answers: Sequence[Sequence[Answer]],
        *,
        by: By = ...,
    ) -> list[int | None]: ...
    def best_of(self, question: Any, images: Any, answers: Any, *, by: By = "pairwise") -> Any:
        """Index of the best answer (see `rank`); None: there are several, and no judgment of them could be read."""
        found = self.rank(question, images, answers, by=by)
        best = [
            None if len(ranking.order) > 1 and ranking.scores[ranking.order[0]] is None else ranking.order[0]
            for ranking in (found if isinstance(question, list) else [found])
        ]
        return best if isinstance(question, list) else best[0]

    def as_trl_reward(self, *, column: str | None = None) -> JudgeReward:
        """This judge as a reward function for TRL's `GRPOTrainer`: the probability that a completion is correct.

        Args:
            column: of the dataset, with the questions as a judge is to see them. None: what the user says in the
                prompt, instructions about the format included.
        """
        return JudgeReward(self, column)

    # ── how ──

    def ask_pointwise(self, question: Question, images: Images, answer: Answer) -> Asked:
        """The prompts that ask whether `answer` is correct. Raises as `pointwise` does."""
        name = self.pointwise_template
        # A template with the options A and B is asked with either of them first: a judge may prefer a letter.
        orders = (True,) if self.templater.templates[name].options is None else (True, False)
        content = as_content(question, images)
        rendered = [
            self.templater.pointwise(
                content, answer, correct=True, correct_first=first, rng=random.Random(0), template=name
            )
            for first in orders
        ]
        return self._process("pointwise", content, rendered)

    def ask_pairwise(self, question: Question, images: Images, a: Answer, b: Answer) -> Asked:
        """The prompts that ask whether `a` is better than `b`, in both orders. Raises as `pairwise` does."""
        name = self.pairwise_template
        content = as_content(question, images)
        rendered = [
            self.templater.pairwise(
                content, correct=a, wrong=b, correct_first=first, rng=random.Random(0), template=name
            )
            for first in (True, False)
        ]
        return self._process("pairwise", content, rendered)

    def judge(self, asked: Sequence[Asked], *, seed: int | None = None) -> list[Judgment | BadRecordError]:
        """The judgment of each of `asked`, which are sampled together, or why the engine refuses a prompt of it.

        Args:
            seed: in place of that of `sampling`.

        Raises:
            EngineError: the engine cannot go on.
        """
        prompts = [prompt for each in asked for prompt in each]
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed)
        sampled = self._sample(prompts, sampling)
        read = self._read(
            [
                (prompt, rollout)
                for prompt, group in zip(prompts, sampled, strict=True)
                if isinstance(group, RolloutGroup)
                for rollout in group.rollouts
            ]
        )
        replies = iter(read)
        orders = iter([tuple(next(replies) for _ in g.rollouts) if isinstance(g, RolloutGroup) else g for g in sampled])
        return [_judgment([next(orders) for _ in each]) for each in asked]

    def _sample(self, prompts: Sequence[ProcessedPrompt], sampling: Sampling) -> list[RolloutGroup | BadRecordError]:
        try:
            return [*self.engine.generate(prompts, self.samples, sampling)]
        except PromptsRefusedError as error:
            return [group or error.reasons[i] for i, group in enumerate(error.groups)]

    def _judge(self, asked: Sequence[Asked]) -> list[Judgment]:
        """As `judge`, for a caller who asks nothing that the engine refuses; the images are not needed any more."""
        judged = self.judge(asked)
        self.processor.forget_images()
        for each in judged:
            if isinstance(each, BadRecordError):
                raise each
        return [each for each in judged if isinstance(each, Judgment)]

    def _read(self, sampled: Sequence[tuple[ProcessedPrompt, Rollout]]) -> list[Reply]:
        """Each reply with its label, and the probability of it."""
        labels = [match_label(rollout.answer_text, prompt.record.choices) for prompt, rollout in sampled]
        probabilities: dict[int, float] = {}
        if self.policy is None:
            for i, (prompt, _) in enumerate(sampled):
                if labels[i] is not None:
                    probabilities[i] = float(labels[i] == prompt.record.gold)
        else:
            processor = cast("Processor", self.processor)  # that of the policy
            found = {i: alternatives(*each, processor) for i, each in enumerate(sampled)}
            asked = {i: each for i, each in found.items() if each is not None}
            scored = label_probabilities(self.policy, list(asked.values()), padding=processor.padding)
            for i, of_labels in zip(asked, scored, strict=True):
                record = sampled[i][0].record
                probabilities[i] = of_labels[record.choices.index(record.gold)]
        return [
            Reply(
                rollout.text,
                labels[i],
                None if labels[i] is None else labels[i] == prompt.record.gold,
                probabilities.get(i),
                rollout.finish_reason,
                rollout.tokens,
                rollout.answer_start,
            )
            for i, (prompt, rollout) in enumerate(sampled)
        ]

    def _process(self, kind: RecycledKind, question: Content, rendered: Sequence[Rendered]) -> Asked:
        problem = PromptRecord("judge", "problem", (), question, gold="", verifier="judgment", recipe="judge")
        return tuple(self.processor.process(each.record(problem, kind, id="judge")) for each in rendered)


def _load(config: JudgeConfig, engine: Sampler | None) -> Loaded:
    """The model with `engine` or, None, that of the configuration."""
    if engine is not None and config.probability == "votes":
        processor = find_family(config.model).load_processor(config.model, max_prompt_tokens=config.max_prompt_tokens)
        return Loaded(engine, processor, processor, None)
    loaded = load_sampler(
        config.model,
        config.rollout if engine is None else replace(config.rollout, engine="transformers"),
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return loaded if engine is None else replace(loaded, sampler=engine)


def _judgment(orders: Sequence[tuple[Reply, ...] | BadRecordError]) -> Judgment | BadRecordError:
    """The judgment, or the first reason why there is none."""
    said = []
    for order in orders:
        if isinstance(order, BadRecordError):
            return order
        said.append(order)
    return Judgment(tuple(said))


def _rows(question: Any, images: Any, *answers: Any) -> list[tuple[Any, ...]]:
    """The arguments of each question: of the one, or of each in a list."""
    if not isinstance(question, list):
        return [(question, images, *answers)]
    columns = [question, [None] * len(question) if images is None else images, *answers]
    if len({len(column) for column in columns}) > 1:
        found = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"the lists of questions, images and answers have lengths {found}; allowed: the same")
    return list(zip(*columns, strict=True))


def _find_template(templater: Templater, kind: str, name: str | None) -> str:
    """`name`, if it is that of a template of this kind; None: the first one, and of pointwise ones the first that asks
    for Yes or No, if any does."""
    of_kind = [template for template in templater.templates.values() if template.kind == kind]
    if name is None:
        return min(of_kind, key=lambda template: template.options is not None).name
    if name not in (names := [template.name for template in of_kind]):
        raise ValueError(f"{kind}_template: found {name!r}; allowed: {', '.join(names)}")
    return name
