"""Every setting of a run: nested dataclasses, read from YAML with command-line overrides by jsonargparse.

`spark-vl train --config run.yaml --optimizer.lr 1e-6`: unknown keys, wrong types and values out of range fail here,
before anything is loaded, with the path of the field. The defaults are ours; where the released code (arXiv 2509.22624)
does otherwise, and the difference is of interest, a docstring says so. `released.yaml` in `scripts/configs` has the
settings of the released 7B run. Docstrings become the help of the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from spark_vl.records import KINDS, Kind

PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
ShareBelowOne = restricted_number_type("ShareBelowOne", float, [(">=", 0), ("<", 1)])

DEFAULT_REASONING_SUFFIX = "\nWork through this step by step, then write only your final answer inside \\boxed{}."


@dataclass
class LoraConfig:
    """Adapters on all linear layers of the language model (arXiv 2106.09685)."""

    rank: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: ClosedUnitInterval = 0.0


@dataclass
class ModelConfig:
    """Which model, and how it is held."""

    path: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id, or folder of a Hugging Face checkpoint with its processor. Of a run or one of its checkpoints, its
    `model/` is taken."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    min_pixels: PositiveInt = 3136
    """Smaller images are enlarged to this many pixels."""
    max_pixels: PositiveInt = 1048576
    """Larger images are reduced to this many pixels: the main knob of memory and time."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """`flex` skips masked blocks of packed groups (CUDA); `sdpa` computes them and works everywhere."""
    gradient_checkpointing: bool = True
    freeze: list[Literal["vision"]] = field(default_factory=list)
    """Parts that are not trained. `vision`: the vision tower with its merger, which then runs without gradient."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights, e.g. {rank: 64, alpha: 128}; needs the extra [lora]. The
    reference policy is then the model without them, at no memory."""


@dataclass
class PromptConfig:
    """How prompts are worded."""

    system: str = ""
    """System prompt of every prompt. Empty: the model's chat template decides, and that of the default model puts "You
    are a helpful assistant." there. `spark-vl recipes NAME --render --model.path MODEL` prints what is sent."""
    reasoning_suffix: str = DEFAULT_REASONING_SUFFIX
    """Appended to each problem."""
    templates: list[str] = field(default_factory=list)
    """YAML files with templates; one that bears the name of a shipped template replaces it."""
    builtin_templates: bool = True
    """Whether the shipped templates are used beside those of `templates`."""


@dataclass
class DataConfig:
    """Which problems."""

    recipes: list[str] = field(default_factory=list)
    """Names of shipped recipes (`spark-vl recipes`) or paths of recipe files. `NAME?weight=1.5`: in an epoch each of
    its rows is asked once, and half of them, drawn anew for each epoch, once more."""
    prompts_per_step: PositiveInt = 64
    """Problems in a step, over all processes."""
    max_prompt_tokens: PositiveInt = 8192
    """Records whose prompt is longer are quarantined."""
    max_row_bytes: PositiveInt = 2**27
    """Bytes of a row, its images among them, as they are stored; larger rows are quarantined. 128 MiB: two of the
    largest images that are read."""
    max_row_images: PositiveInt = 256
    """Images of a row; rows with more are quarantined. The default `max_prompt_tokens` has room for that many of 32
    tokens."""
    max_row_chars: PositiveInt = 1_000_000
    """Characters of all texts of a row, and values in it; rows with more are quarantined. A hundred times what fits
    into a prompt of the default length. Lines of JSON may have four bytes for each."""
    max_quarantined_fraction: ClosedUnitInterval = 0.05
    """The run stops when more of the rows seen cannot be used than chance would give with this share."""


@dataclass
class VLLMConfig:
    """Where `rollout.engine: vllm` samples (extra [vllm]; docs/rollouts.md says how to choose and size it)."""

    mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: in the training processes, on the same devices, which it leaves to the update while it sleeps.
    `server`: one or more servers (`spark-vl serve-rollouts`), on devices of their own."""
    servers: list[str] = field(default_factory=list)
    """`mode: server`: their addresses, e.g. [http://node7:8000]. Prompts are spread over them."""
    tensor_parallel: PositiveInt = 1
    """Devices that hold one copy of the model together: `colocate`: neighboring training processes, which have to be on
    one node; `spark-vl serve-rollouts`: those of the server."""
    memory_share: PositiveShare = 0.35  # type: ignore[valid-type]  # made at run time
    """Share of a device's memory for weights and key-value cache, `mode: colocate`. 0.35 leaves the rest of an 80 GB
    device to the update of a 7B model that is sharded over 8."""
    enforce_eager: bool = False
    """Without CUDA graphs: starts faster, decodes slower."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that a run waits for its servers at its start."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds after which a request to a server has failed: the completions of one prompt, or one bucket of weights."""
    retries: NonNegativeInt = 3
    """How often a request for completions is repeated where that may help: no connection, timeout, server error."""
    sync_port: NonNegativeInt = 0
    """`mode: server`: TCP port of the first training process for sending weights; 0: a free one."""
    sync_bucket_mb: PositiveInt = 512
    """MiB of weights that are gathered and sent at a time: bounds the memory of an update of the engine."""
    max_canary_gap: PositiveFloat | None = None
    """After each update of the engine it continues two fixed prompts, one with an image, and the policy scores what it
    wrote. At most this mean absolute difference in nats per token is allowed. null: as `rollout.max_logprob_gap`."""
    importance_clip: PositiveFloat | None = 2.0
    """A token's gradient is weighted by its probability under the policy over that under the engine, which computes
    otherwise in bfloat16, but at most by this (truncated importance sampling). null: not weighted."""


@dataclass
class OpenAIConfig:
    """The server that `rollout.engine: openai` asks, which speaks OpenAI's chat completions: a provider's, vLLM's,
    SGLang's, llama.cpp's. For evaluations and judges; docs/evaluation.md says what a figure through it means."""

    base_url: str | None = None
    """Where it is, up to and with the version, e.g. http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model at the server; null: `model.path`."""
    token_from: str | None = None
    """Where the key is: env:NAME or file:PATH; null: the server asks for none. It is never written down."""
    concurrency: PositiveInt = 32
    """Requests under way together, one for each completion. 32 keeps a server busy that batches, and stays below what
    most providers allow; one that does not answers 429, and is asked again later."""
    timeout_s: PositiveFloat = 600.0
    """Seconds without a byte after which a request has failed. No byte comes before the completion is done."""
    retries: NonNegativeInt = 5
    """How often a request is repeated where that may help: no connection, timeout, rate limit, server error. The waits
    between double from 1 s, or are what the server says; with 5 they add up to half a minute."""


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """`transformers`: in the training process, on any platform. `vllm`: see `vllm`. `openai`: by a server that has the
    model, see `openai`; not for training."""
    n: PositiveInt = 8
    """Completions for each prompt: the group size G."""
    temperature: PositiveFloat = 1.0
    top_p: PositiveShare = 1.0  # type: ignore[valid-type]  # made at run time
    """Share of the probability that tokens are drawn from, the likeliest first. For evaluation alone: training samples
    from the whole distribution, the one that log-probabilities are computed under."""
    max_new_tokens: PositiveInt = 768
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    decode_batch_size: PositiveInt = 256
    """Completions decoded together on one process: bounds the memory of the key-value cache."""
    gather: Literal["phase", "layer"] = "phase"
    """With sharded weights (ZeRO-3, FSDP2). `phase`: each process holds all weights while it samples (7B in bfloat16:
    16.6 GB, 32B: 67 GB beside its shard), and they are gathered once. `layer`: one layer at a time, gathered anew for
    each token: little memory, many times slower, and all processes decode in step."""
    startup_check: bool = True
    """Whether a training run, before its first update and after each resume, scores one of its groups packed and each
    completion alone, and stops where these log-probabilities and the sampler's are not the same: a fault that would
    otherwise train to nothing, found for one pass more than the group has completions (the released code: no)."""
    max_logprob_gap: PositiveFloat | None = None
    """What counts as the same, there and in each step of training: at most this mean absolute difference in nats per
    token. null: 1e-4 with `model.dtype: float32`, 5e-2 with bfloat16. With `model.lora.dropout`, which the update has
    and the sampler has not, null bounds the start only."""
    on_logprob_gap: Literal["stop", "warn"] = "stop"
    """What happens after a step whose `rollout/sampler_logprob_gap` is above the bound. `stop`, the default: such
    updates follow the gradient of another policy, the last checkpoint is from before, and a false alarm costs no more
    than the steps since then (`--resume auto --rollout.on_logprob_gap warn`). `warn`: one line for each such step."""


@dataclass
class VerifierConfig:
    """How completions are scored."""

    workers: PositiveInt = 2
    """Worker processes that run the verifiers which can hang (math, a user's own)."""
    timeout_s: PositiveFloat = 10.0
    """Seconds after which the verification of one completion is killed and scores 0."""
    memory_mb: PositiveInt = 2048
    """MiB that each worker process may hold; a verifier that needs more scores 0."""


@dataclass
class RecycleConfig:
    """How verified rollouts become judge and reflection prompts (§3 of the paper)."""

    schedule: Literal["merged", "sequential", "none"] = "merged"
    """`sequential`: update on problems, sample the recycled prompts with the updated policy, update again (the
    released code).
    `merged`: this step's problems and the prompts recycled in the last one share one generation and one update: a step
    has one phase of updates where one of `sequential` has two.
    `none`: plain reinforcement learning with verifiable rewards."""
    max_judge: NonNegativeInt = 32
    """Judge prompts (pointwise and pairwise) a step, over all processes."""
    max_reflection: NonNegativeInt = 32
    """Reflection prompts a step, over all processes."""
    batch: PositiveInt | None = None
    """Recycled prompts are taken this many at a time, over all processes, the oldest first: fewer wait until there are
    as many (the released code: 64). null: a phase takes all that wait."""
    pairwise_share: ClosedUnitInterval = 0.7
    """Share of groups with right and wrong rollouts that give a pairwise prompt; the rest give pointwise ones. With
    `matched_pairs`, while `max_judge` leaves room, each gives the other kind, too, unless the share is 0 or 1."""
    pointwise: Literal["matched_pairs", "one_per_group"] = "matched_pairs"
    """`matched_pairs`: a group with right and wrong rollouts gives two pointwise prompts, one on an answer of each
    kind, which are kept or left out together, so that difficulty does not predict the label.
    `one_per_group`: each group gives one, on either answer; nothing is balanced, and easy questions go with 'right'
    (the released code)."""
    unanimous_share: ShareBelowOne = 0.05  # type: ignore[valid-type]  # made at run time
    """With `matched_pairs`: share s of the pointwise prompts that may quote groups whose rollouts are all right or all
    wrong, as many of either. Difficulty then predicts the label with an area under the ROC curve of .5 + s - s²/2."""
    a_is_correct: bool = False
    """Whether A is the right answer's option in all pointwise prompts with options (the released code: yes); false: it
    is drawn."""
    judge_sees: Literal["answer", "cot", "mixed"] = "answer"
    """What a judge is shown: final answers (the released code), whole completions, or either with equal chance."""
    reflection_cot_share: ClosedUnitInterval = 0.5
    """Share of reflections that quote the whole completion; the rest quote the final answer only."""
    correct_reflection_share: ClosedUnitInterval = 0.25
    """Share of reflections that quote a right answer, so that 'change it' is not always right (the released code: 0).
    """
    judge_reflections: bool = False
    """Whether the groups of reflection prompts are recycled too, into pointwise prompts."""
    recycle_truncated: bool = False
    """Whether completions cut off by the length limit count as evidence (the released code: yes)."""


@dataclass
class SelfJudgeConfig:
    """Problems without a right answer (`verifier: self_judge` in a recipe): the policy that is trained judges its own
    completions, and is rewarded with its verdict."""

    recipes: list[str] = field(default_factory=list)
    """Verified problems that are not trained on, which tell how well the policy judges. Needed where a recipe of
    `data.recipes` has prompts that are self-judged."""
    split: str = "validation"
    problems: PositiveInt = 64
    """Held-out problems, drawn with a fixed seed."""
    samples: PositiveInt = 4
    """Completions of each of them. One right and one wrong answer to each problem, if there are both, are judged."""
    every: PositiveInt = 10
    """Steps between two measurements; the first is before the first step."""
    min_accuracy: ClosedUnitInterval = 0.75
    """Balanced accuracy on the answers to held-out problems from which on the policy is believed. Below it, and where
    it cannot be measured, because all these answers are right or all are wrong, self-judged prompts are left out. A
    coin has 0.5."""
    ask: Literal["pointwise", "pairwise"] = "pointwise"
    """`pointwise`: each distinct answer of a group is judged alone, and its reward is the share of votes for it.
    `pairwise`: each is compared with each in both orders, and its reward is the mean share of votes over the others."""
    votes: PositiveInt = 4
    """Judgments of each answer, or of each order of a pair, sampled as completions are."""
    average: OpenUnitInterval | None = None
    """The judge is an exponential average of the policy's weights over steps, of which this share remains in each step:
    with 0.99 it is about the policy of a hundred steps ago, and follows its errors as late. It costs as much memory as
    the trained weights have in float32; with `rollout.engine: transformers`, and weights that are not sharded. null:
    the policy as it is, as cheap as it can be."""


@dataclass
class ObjectiveConfig:
    """What the update maximizes."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    beta: NonNegativeFloat = 0.001
    """Coefficient of the KL penalty (k3 estimator, in the loss). 0: no reference policy is loaded."""
    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above 1 + clip_high (DAPO: 0.28)."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Coefficient of the mean token entropy, which is maximized. Fights a judge that always says the same."""
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    """Weight of each kind of prompt in the loss."""
    refill_rounds: dict[str, int] = field(default_factory=dict)
    """Dynamic sampling: for each kind of prompt, how often groups without variance are replaced by fresh ones before
    the update, e.g. {problem: 2, pointwise: 1}. Empty: never."""


@dataclass
class OptimizerConfig:
    """How the weights move."""

    lr: PositiveFloat = 5e-7
    """Peak learning rate (AdamW), of one optimizer update. A step has `updates_per_batch` of them, with
    `recycle.schedule: sequential` twice as many."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of AdamW's first and second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, of matrices, embeddings and adapters. Norms and biases never decay."""
    max_grad_norm: PositiveFloat = 1.0
    warmup_updates: NonNegativeFloat = 0
    """Optimizer updates over which the learning rate rises from 0; below 1 it is a share of all updates of the run
    (0.03: 3 %)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. It ends with the run, whatever was left out: phases without prompts and skipped
    updates count."""
    min_lr_ratio: ClosedUnitInterval = 0.0
    """Where `schedule: cosine` ends, as a share of `lr` (the released code: 0.1)."""
    updates_per_batch: PositiveInt = 1
    """Optimizer updates on one batch of rollouts, each on its own part. Above 1 the later ones are slightly off-policy
    and the ratio clipping matters."""
    tokens_per_pack: PositiveInt = 16384
    """Prompt and completion tokens in one forward pass: bounds the memory of the update. With `sdpa` attention costs
    the square of it, so what holds about one group (a prompt with its completions) is fastest."""
    max_skipped_updates: PositiveInt = 3
    """An update whose loss or gradient is not finite is skipped and counted; after this many in a row the run stops and
    leaves the batch in `nonfinite/`."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation before, during and after training."""

    recipes: list[str] = field(default_factory=list)
    """Recipes to evaluate on; none: no evaluation."""
    split: str = "test"
    problems: PositiveInt | None = 200
    """Problems of each recipe, drawn with a fixed seed, the same at every evaluation; null: all."""
    samples: NonNegativeInt = 4
    """Completions a prompt, at the rollout temperature, for the sampled figures, and for the majority that test-time
    reflection is compared with; 0: greedy answers alone."""
    judging: bool = True
    """Also ask about a right and a wrong answer to each problem, and about the model's own: six more prompts a problem,
    and up to two. Benchmarks of solving do not need it."""
    max_new_tokens: PositiveInt | None = None
    """Limit on a completion of the evaluation; null: rollout.max_new_tokens. The released evaluation: 2048."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the logits of tokens that are there already. 1: none, as rollouts are sampled. The released evaluation:
    1.05, which the generation configuration of its model asks for."""
    reflection_rounds: NonNegativeInt = 1
    """Test-time reflection: how often an answer may be judged and, if judged wrong, revised. It stops at the first
    verdict "correct", or after so many rounds; all is greedy. One, since each round costs a judgment and a new answer;
    0: none.
    The released evaluation: 2, with the same stop rule, greedy too."""
    reflection_claim: Literal["check", "wrong"] = "check"
    """What the prompt of a revision claims: "check this answer", or "this answer is wrong", which the model has judged
    but nobody knows. The released evaluation: wrong."""
    unreadable_judgment: Literal["keep", "reflect"] = "keep"
    """What a judgment without a verdict does: the answer is kept, or revised as if it were judged wrong. Keep, since it
    says nothing against the answer. The released evaluation: reflect, on all but a readable "Yes"."""
    every: NonNegativeInt = 0
    """Evaluate every this many steps; 0: only before and after the run."""


@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    every: NonNegativeInt = 50
    """Save every this many steps and at the end; 0: only at the end."""
    save_total_limit: PositiveInt = 2
    """How many of the newest checkpoints are kept; the best one (`keep_best`) is kept beside them."""
    keep_best: str | None = None
    """Figure of the evaluation, e.g. reasoning_sampled. Whenever it is higher than ever before, the step is saved and
    `checkpoints/best` names it."""


@dataclass
class LoggingConfig:
    """What is written while it runs; `metrics.jsonl` always is."""

    trackers: list[str] = field(default_factory=list)
    """Trackers of Accelerate: tensorboard, wandb, trackio, ..., which have to be installed. Their project is called as
    the folder that `output_dir` is in, the run as `output_dir` itself."""
    judgments: bool = True
    """Keep all rollouts, problems' and judges', with images and verdicts in `judgments/`: a dataset that can be
    published (`spark-vl publish judgments`) and recycled anew (`spark-vl recycle`)."""


@dataclass
class PublishConfig:
    """Publishing while the run goes on, in the background. That the Hub is down neither stops nor delays training."""

    repo: str | None = None
    """`ORG/NAME` of the model's repository; null: nothing is published."""
    every: PositiveInt = 1
    """Publish every this many checkpoints, and the last one."""
    revision: str | None = None
    """Branch; null: main."""
    public: bool = False
    """Whether everybody can see a repository that is made."""
    token_from: str | None = None
    """Where the token is: env:NAME or file:PATH; null: HF_TOKEN, or that of `hf auth login`."""
    wait_s: NonNegativeFloat = 600.0
    """Seconds that the finished run waits at most for the last checkpoint to be published."""


@dataclass
class DistributedConfig:
    """What several processes need. How many there are and how weights are sharded is said by `accelerate launch`."""

    timeout_s: PositiveFloat = 1800.0
    """Seconds without any progress after which the run stops, naming the processes and where they are."""


@dataclass
class TrainConfig:
    """A training run."""

    output_dir: str = "runs/spark"
    """Folder of the run: config.yaml, metrics.jsonl, judgments/, checkpoints/, model/; with an evaluation
    evaluations.jsonl and summary.json."""
    seed: NonNegativeInt = 0
    steps: PositiveInt | None = None
    """Training steps; null: as many as `epochs` gives."""
    epochs: PositiveFloat = 2.0
    """Passes over the problems, when `steps` is null."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    recycle: RecycleConfig = field(default_factory=RecycleConfig)
    self_judge: SelfJudgeConfig = field(default_factory=SelfJudgeConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass
class EvalConfig:
    """An evaluation of a checkpoint."""

    output: str = "runs/eval"
    """Folder for `results.json`, `results.md`, `samples.jsonl`, and all that is needed to make the figures again. An
    evaluation that was killed goes on from there."""
    seed: NonNegativeInt = 0
    max_prompt_tokens: PositiveInt = DataConfig.max_prompt_tokens
    """Problems whose prompt is longer are left out and counted."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """If nothing here is set, a model that a run has saved is asked in the words that it was trained on."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ask: list[Literal["pairwise", "pointwise"]] = field(default_factory=lambda: ["pairwise", "pointwise"])
    """How the answers of a reward benchmark are judged: two side by side, in both orders, and each alone."""
    votes: PositiveInt = 1
    """Judgments of each answer, and of each order of a pair, on reward benchmarks. 1: greedy. More: sampled at
    `rollout.temperature`; the majority counts."""


@dataclass
class JudgeConfig:
    """Answers judged by a model."""

    output: str = "judged.jsonl"
    """File that gets one line of JSON for each row, beginning with one of the settings. Rows that it holds already are
    not asked again."""
    media_root: str | None = None
    """Folder that image paths are relative to and cannot leave; null: that of the rows."""
    seed: NonNegativeInt = 0
    """Of sampled judgments."""
    rows_at_once: PositiveInt = 64
    """Rows that are sampled together, and then written together: what is lost when the command is killed."""
    samples: PositiveInt = 1
    """Judgments of each answer, and of each order of a pair. 1: greedy, so that the verdict is always the same. More:
    sampled at `rollout.temperature`."""
    probability: Literal["labels", "votes"] = "labels"
    """`labels`: that of the label behind the judgment's reasoning, among the two labels, averaged over the samples; it
    costs one more forward pass. `votes`: the share of the samples that say so."""
    pointwise_template: str | None = None
    """Name of the template that asks about one answer; null: the first that asks for Yes or No."""
    pairwise_template: str | None = None
    """Name of the template that asks about two; null: the first."""
    max_prompt_tokens: PositiveInt = DataConfig.max_prompt_tokens
    """Rows whose prompt is longer are not judged, and counted."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """If nothing here is set, a model that a run has saved is asked in the words that it was trained on."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class OfflineConfig:
    """Recycling without a model, from the rollouts that a run wrote down."""

    output: str = "runs/recycled"
    """Folder that gets `judgments/`, which `spark-vl publish judgments` takes."""
    seed: NonNegativeInt = 0
    prompts: PromptConfig = field(default_factory=PromptConfig)
    recycle: RecycleConfig = field(default_factory=RecycleConfig)


class ConfigError(ValueError):
    """A setting that no run can use; the message starts with the path of the field."""


@contextmanager
def blamed_on(setting: str) -> Iterator[None]:
    """Turn an error about a file or a value that `setting` names into a `ConfigError` about that setting."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {error}") from error


def read_token(token_from: str, option: str) -> str:
    """The token in what `token_from` names: `env:NAME` or `file:PATH`.

    The token itself is never given on a command line, where the shell's history and other users would see it.

    Args:
        option: which names `token_from`, for messages.

    Raises:
        ConfigError: no token is found there.
    """
    kind, _, name = token_from.partition(":")
    if kind == "env":
        value = os.environ.get(name)
        if not value:
            raise ConfigError(f"{option}: the environment variable {name!r} is not set")
    elif kind == "file":
        try:
            value = Path(name).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option}: cannot read the token: {error}") from error
    else:
        is_token = token_from.startswith(("hf_", "sk-")) or len(token_from) > 24  # some have no prefix
        shown = "a token itself" if is_token else repr(token_from)
        raise ConfigError(f"{option}: found {shown}; allowed: env:NAME, file:PATH")
    if not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(f"{option}: {token_from} holds {len(value)} characters that are not one token")
    return value


def save_config(config: TrainConfig | EvalConfig, path: Path) -> None:
    """Write `config`, all defaults resolved, as YAML that `--config` reads back."""
    path.write_text(dump_config(asdict(config)))


def dump_config(settings: Mapping[str, Any]) -> str:
    """Settings as YAML that `--config` reads back."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_MAX_CONFIG_BYTES = 2**18
"""Of a saved configuration, which has some kilobytes. Some numbers in YAML take quadratic time."""


def read_config(file: Path) -> dict[str, Any]:
    """The settings that `save_config` or `dump_config` wrote. Somebody else may have changed them: a file of a few
    hundred bytes whose aliases stand for billions of values is refused.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("it is not a regular file")
        if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes; {_MAX_CONFIG_BYTES} are allowed")
        settings = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        if not isinstance(settings, dict):
            raise ValueError(f"found {type(settings).__name__}; allowed: a mapping of settings")
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    return settings


_FREE_TO_CHANGE = (
    *("output_dir", "logging", "checkpoint", "publish", "distributed"),
    *("rollout.startup_check", "rollout.max_logprob_gap", "rollout.on_logprob_gap", "rollout.vllm.max_canary_gap"),
    # Servers that have moved, or are slower there.
    *("rollout.vllm.servers", "rollout.vllm.sync_port", "rollout.vllm.start_timeout_s", "rollout.vllm.timeout_s"),
    "rollout.vllm.retries",
)
"""Settings that do not change what a run computes."""


def config_differences(old: dict[str, Any], new: TrainConfig) -> list[str]:
    """The settings in which a saved configuration, as read from its YAML, differs from `new`: `path: old → new`.

    Those that do not change what a run computes are left out.
    """
    changed = differences(flat(old), flat(asdict(new)), free=_FREE_TO_CHANGE)
    return [f"{path}: {was!r} → {now!r}" for path, (was, now) in changed.items()]


def differences(
    was: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Path of each setting in which `flat` settings differ → both values; one that is not there is None.

    Args:
        free: settings, and groups of settings, that may differ.
    """
    groups = tuple(f"{name}." for name in free)
    return {
        path: (was.get(path), now.get(path))
        for path in dict.fromkeys([*was, *now])
        if was.get(path) != now.get(path) and not f"{path}.".startswith(groups)
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `group.name` → value."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


class _Loader(yaml.SafeLoader):
    """Refuses aliases, which `_Dumper` does not write."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See `yaml.composer.Composer`."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has aliases (*name); allowed: each value written out")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts such as 1e3 too, which jsonargparse, unlike PyYAML, reads as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        """A value that occurs twice is written twice."""
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.\d][-+.\d_eE:]*$"), list("-+.0123456789"))


__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "Kind",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OfflineConfig",
    "OpenAIConfig",
    "OptimizerConfig",
    "PromptConfig",
    "PublishConfig",
    "RecycleConfig",
    "RolloutConfig",
    "SelfJudgeConfig",
    "TrainConfig",
    "VLLMConfig",
    "VerifierConfig",
    "blamed_on",
    "config_differences",
    "differences",
    "dump_config",
    "flat",
    "read_token",
    "save_config",
]
