"""The memory of a whole run, from the shape of the model and the settings alone.

Three phases of a step are told apart, for each has its own peak: the passes of the update (forward and backward), the
optimizer's step, and the rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from spark_vl.config import ConfigError, TrainConfig
from spark_vl.estimate.activations import activation_bytes, rollout_bytes
from spark_vl.estimate.shape import Shape
from spark_vl.estimate.weights import (
    Phases,
    Setup,
    autocast,
    computing,
    held,
    low_bytes,
    reference,
    trained_parameters,
)

GIB = 2**30

RESERVED = 4 * GIB
"""On each GPU, for what no tensor shows: CUDA's context, NCCL's buffers, fragmentation. A guess."""
HOST_PROCESS = 4 * GIB
"""Of host memory, for each process with its libraries and its workers. A guess."""
EVALUATION_PROMPTS = 7
"""Prompts that an evaluation makes of a problem: itself, and both sides of each judgment and reflection."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs."""

    rows: Mapping[str, Phases]
    """What it is for → bytes on one GPU."""
    host: Mapping[str, int]
    """What it is for → bytes of host memory for one process."""
    share_lacks: int = 0
    """Bytes by which vLLM's share of a GPU is too small for it to start."""

    @property
    def total(self) -> Phases:
        """The sum of the rows."""
        return Phases(*map(sum, zip(*self.rows.values(), strict=True)))


def estimate(shape: Shape, config: TrainConfig, setup: Setup) -> Estimate:
    """The memory of a run with the settings `config` on `setup`.

    Raises:
        ConfigError: the parts of `setup` do not go together.
    """
    _check(setup)
    prompt = prompt_tokens(shape, config, setup)
    rows = held(shape, config.model, setup)
    rows |= {
        "reference policy": reference(shape, config.model, config.objective.beta, setup),
        "weights gathered or cast": computing(shape, config.model, config.rollout, setup),
        "activations": Phases(update=_activations(shape, config, setup, prompt)),
        **_rollout(shape, config, setup, prompt),
        "CUDA, NCCL, fragmentation": Phases.always(RESERVED),
    }
    lacks = 0
    if colocated(config):
        weights, token = vllm_bytes(shape, config)
        new = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
        longest = config.data.max_prompt_tokens + new
        lacks = max(0, weights + longest * token - vllm_share(config, setup))
    return Estimate(_left_on_gpu(rows, setup), _host(shape, config, setup, rows), lacks)


def colocated(config: TrainConfig) -> bool:
    """Whether vLLM samples on the GPUs of the run."""
    return config.rollout.engine == "vllm" and config.rollout.vllm.mode == "colocate"


def vllm_share(config: TrainConfig, setup: Setup) -> int:
    """Bytes of a GPU that vLLM takes while it samples."""
    return int(config.rollout.vllm.memory_share * setup.gpu_memory * GIB)


def vllm_bytes(shape: Shape, config: TrainConfig) -> tuple[int, int]:
    """On one GPU of vLLM: bytes of its part of the weights, and of the keys and values of a token. A head is not
    divided, so more GPUs than there are heads of keys hold copies."""
    low, parts = low_bytes(config.model), config.rollout.vllm.tensor_parallel
    heads = ceil(shape.num_key_value_heads / parts)
    return low * shape.parameters // parts, low * 2 * shape.num_hidden_layers * heads * shape.head_dim


def _check(setup: Setup) -> None:
    if setup.fsdp and setup.zero:
        raise ConfigError(f"zero: found {setup.zero} together with fsdp; allowed: one of the two")
    if setup.offload != "none" and not (setup.fsdp or setup.zero):
        raise ConfigError(f"offload: found {setup.offload!r}, which needs ZeRO or FSDP2; allowed: 'none'")
    if setup.offload == "optimizer" and setup.fsdp:
        raise ConfigError("offload: found 'optimizer' with FSDP2; allowed: 'none', 'optimizer+weights'")
    if setup.offload == "optimizer+weights" and not setup.sharded:
        raise ConfigError(f"offload: found 'optimizer+weights' with ZeRO-{setup.zero}; allowed: 'none', 'optimizer'")


def prompt_tokens(shape: Shape, config: TrainConfig, setup: Setup) -> int:
    """The tokens that a prompt is taken to have."""
    tokens = setup.images * shape.vision.image_tokens(config.model.max_pixels) + setup.text_tokens
    return min(tokens, config.data.max_prompt_tokens)


def _activations(shape: Shape, config: TrainConfig, setup: Setup, prompt: int) -> int:
    """Of one pack, full of prompts: an upper bound, for their completions need room too."""
    tokens = config.optimizer.tokens_per_pack
    image = shape.vision.image_tokens(config.model.max_pixels)
    images = max(1, tokens // prompt) * setup.images
    # A pack without an image gets one of 4 tokens.
    patches = shape.vision.patches(max(4, min(images * image, tokens)))
    return activation_bytes(shape, config.model, tokens=tokens, patches=patches, cast=autocast(config.model, setup))


def _rollout(shape: Shape, config: TrainConfig, setup: Setup, prompt: int) -> dict[str, Phases]:
    """Sampling in the training process, the largest of its batches; or vLLM's share."""
    if config.rollout.engine == "vllm":
        return {"vLLM's share": Phases(rollout=vllm_share(config, setup) if colocated(config) else 0)}
    cache, working = max(
        (
            rollout_bytes(
                shape,
                config.model,
                prompts=prompts,
                n=n,
                prompt=prompt,
                image=min(setup.images * shape.vision.image_tokens(config.model.max_pixels), prompt),
                new=config.rollout.max_new_tokens,
                cast=autocast(config.model, setup),
            )
            for prompts, n in batches(config, setup)
        ),
        key=sum,
    )
    return {"key-value cache": Phases(rollout=cache), "prefill and decoding": Phases(rollout=working)}


def batches(config: TrainConfig, setup: Setup) -> list[tuple[int, int]]:
    """(prompts, completions of each) that one process samples together: in training, and where there is an evaluation
    its greedy and its sampled completions."""
    at_once, n = config.rollout.decode_batch_size, config.rollout.n
    found = [(min(max(1, at_once // n), _prompts_of_a_process(config, setup)), n)]
    if config.evaluation.recipes:
        # All problems of a set are more than a batch holds.
        problems = (config.evaluation.problems or at_once * setup.gpus) * len(config.evaluation.recipes)
        share = ceil((EVALUATION_PROMPTS if config.evaluation.judging else 1) * problems / setup.gpus)
        found += [(min(max(1, at_once // each), share), each) for each in (1, config.evaluation.samples) if each]
    return found


def _prompts_of_a_process(config: TrainConfig, setup: Setup) -> int:
    """Prompts that a process samples from at once, at most: those of the step, and with `merged` the recycled ones."""
    problems = ceil(config.data.prompts_per_step / setup.gpus)
    recycled = ceil((config.recycle.max_judge + config.recycle.max_reflection) / setup.gpus)
    at_once = {"none": problems, "merged": problems + recycled, "sequential": max(problems, recycled)}
    return at_once[config.recycle.schedule]


def _left_on_gpu(rows: Mapping[str, Phases], setup: Setup) -> dict[str, Phases]:
    """`rows` without what is offloaded. ZeRO-3 and FSDP2 offload gradients with the optimizer; ZeRO-1 and 2 gather them
    on the GPU first."""
    gone: set[str] = set()
    if setup.offload != "none":
        gone = {"optimizer", "gradients"} if setup.sharded else {"optimizer"}
    if setup.offload == "optimizer+weights":
        gone |= {"weights", "reference policy"}
    return {name: Phases() if name in gone else row for name, row in rows.items()}


def _host(shape: Shape, config: TrainConfig, setup: Setup, rows: Mapping[str, Phases]) -> dict[str, int]:
    """Host memory of one process.

    Loading is over when training begins, so the larger of the two counts. Each process loads the whole checkpoint: in
    the type that it holds; ZeRO-3 reads the file as it is, in bfloat16 (pages of one file are shared, which is not
    counted). The optimizer in host memory has, beside its states, float32 gradients and a copy of the weights in w
    bytes (ZeRO-1, 2) or of the gradients (ZeRO-3).
    """
    low = low_bytes(config.model)
    if setup.zero == 3:
        loading = 2 * shape.parameters
    else:
        loading = (low if setup.zero or config.model.lora else 4) * shape.parameters
    image = shape.vision.patches(shape.vision.image_tokens(config.model.max_pixels)) * shape.vision.patch_values * 4
    images = _prompts_of_a_process(config, setup) * setup.images * image
    offloaded = 0
    if setup.offload != "none":
        local = trained_parameters(shape, config.model) // setup.gpus
        offloaded = rows["optimizer"].update + (4 if setup.fsdp else 4 + (4 if setup.zero == 3 else low)) * local
    if setup.offload == "optimizer+weights":
        offloaded += rows["weights"].update + rows["reference policy"].update
    asleep = vllm_bytes(shape, config)[0] if colocated(config) else 0
    return {
        "process": HOST_PROCESS,
        "images of a step": images,
        "offloaded": offloaded,
        "vLLM's weights while it sleeps": asleep,
        "more while loading": max(0, loading - images - offloaded - asleep),
    }
