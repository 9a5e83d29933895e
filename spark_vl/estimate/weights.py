"""What is held for the weights: the weights, their gradients, the optimizer, and copies that a pass computes with.

Exact to DeepSpeed's padding, and measured in `tests/distributed/test_estimate.py`. All results are bytes on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from spark_vl.config import ModelConfig, RolloutConfig
from spark_vl.estimate.shape import Shape

# What `scripts/deepspeed/*.json` say; in elements.
ZERO2_BUCKET = 200_000_000
ZERO3_BUCKET = 100_000_000
ZERO3_PREFETCH = 100_000_000
ZERO3_LIVE = 1_000_000_000
ZERO3_SUB_GROUP = 1_000_000_000
"""Elements of a shard that the optimizer's step takes at once (DeepSpeed's default)."""


@dataclass
class Setup:
    """What `accelerate launch`, the GPUs and the data decide, rather than a setting of the run."""

    gpus: PositiveInt = 1
    """Processes, one for each GPU."""
    zero: Literal[0, 1, 2, 3] = 0
    """Stage of DeepSpeed's ZeRO. 0: no DeepSpeed; a copy of everything on each GPU (DDP)."""
    fsdp: bool = False
    """PyTorch's FSDP2 in place of DeepSpeed."""
    offload: Literal["none", "optimizer", "optimizer+weights"] = "none"
    """What is kept in host memory."""
    gpu_memory: PositiveFloat = 80.0
    """GiB of a GPU."""
    host_memory: PositiveFloat | None = None
    """GiB of a machine; null: whatever is needed."""
    gpus_per_machine: PositiveInt = 8
    images: NonNegativeInt = 1
    """Images of a prompt, each of `model.max_pixels`."""
    text_tokens: PositiveInt = 1024
    """Tokens of text of a prompt, quoted completions included. With its images a prompt is no longer than
    `data.max_prompt_tokens`."""

    @property
    def sharded(self) -> bool:
        """Whether a GPU holds only a part of the weights."""
        return self.fsdp or self.zero == 3


class Phases(NamedTuple):
    """Bytes on one GPU in each phase of a step."""

    update: int = 0
    step: int = 0
    rollout: int = 0

    @classmethod
    def always(cls, size: int) -> Phases:
        """`size` in all phases."""
        return cls(size, size, size)


def low_bytes(model: ModelConfig) -> int:
    """Bytes of a number of `model.dtype`."""
    return 2 if model.dtype == "bfloat16" else 4


def autocast(model: ModelConfig, setup: Setup) -> bool:
    """Whether trained float32 weights are computed with in bfloat16, by torch's autocast."""
    return model.dtype == "bfloat16" and not setup.zero and not setup.fsdp


def trained_parameters(shape: Shape, model: ModelConfig) -> int:
    """How many weights are trained: adapters alone, or all but what is frozen."""
    if model.lora:
        return shape.adapters(model.lora.rank)
    return shape.parameters - (shape.vision.parameters if "vision" in model.freeze else 0)


def cast_bytes(shape: Shape, model: ModelConfig) -> int:
    """Bytes of the bfloat16 copies that autocast keeps: of what is trained and multiplied with, so not of the
    embedding."""
    trained = trained_parameters(shape, model)
    return 2 * (trained - (0 if model.lora or shape.tie_word_embeddings else shape.embedding))


def held(shape: Shape, model: ModelConfig, setup: Setup) -> dict[str, Phases]:
    """Weights, gradients and optimizer, as if nothing were offloaded.

    With P weights, A of them trained, n processes, and w = 2 bytes for bfloat16, 4 for float32:

    |          | weights | gradients             | optimizer | buffers               |
    |----------|---------|-----------------------|-----------|-----------------------|
    | one, DDP | 4 P     | 4 A                   | 8 A       | 4 A (if n > 1)        |
    | ZeRO-1   | w P     | 4 A (+ 2 A, bfloat16) | 12 A / n  |                       |
    | ZeRO-2   | w P     | 4 A / n               | 12 A / n  | 2 buckets             |
    | ZeRO-3   | w P / n | 4 A / n               | 12 A / n  | 1 bucket              |
    | FSDP2    | 4 P / n | 4 A / n               | 8 A / n   |                       |

    AdamW's moments are 8 bytes; DeepSpeed adds float32 master weights, also to float32 weights, and accumulates
    gradients in float32 (`data_types` in `scripts/deepspeed/`). With adapters, the frozen weights have w bytes
    everywhere. DeepSpeed keeps whole the tensors below `stage3_param_persistence_threshold` (biases, norms: less than a
    thousandth), which is not counted.
    """
    n, low = setup.gpus, low_bytes(model)
    trained = trained_parameters(shape, model)
    adapters = shape.adapters(model.lora.rank) if model.lora else 0
    if setup.zero:
        weights = low * (shape.parameters + adapters)
    else:
        weights = (low if model.lora else 4) * shape.parameters + 4 * adapters
    match setup:
        case Setup(fsdp=True):
            gradients, optimizer, buffers = Phases(4 * trained // n, 4 * trained // n), 8 * trained // n, Phases()
        case Setup(zero=0):
            gradients, optimizer = Phases(4 * trained, 4 * trained), 8 * trained
            buffers = Phases.always(4 * trained if n > 1 else 0)
        case Setup(zero=1):
            # In bfloat16 with float32 accumulation DeepSpeed takes its BF16_Optimizer, which never frees the sum.
            gradients = Phases.always(4 * trained) if low == 2 else Phases(4 * trained, 4 * trained)
            gradients = gradients._replace(update=(4 + (2 if low == 2 else 0)) * trained)
            optimizer, buffers = 12 * trained // n, Phases()
        case Setup(zero=2):
            gradients, optimizer = Phases(4 * trained // n, 4 * trained // n), 12 * trained // n
            buffers = Phases(update=2 * low * ZERO2_BUCKET)  # two, for `overlap_comm`
        case _:
            gradients, optimizer = Phases.always(4 * trained // n), 12 * trained // n
            buffers = Phases.always(low * ZERO3_BUCKET)
    # Temporaries of torch's AdamW on GPUs (`foreach`): a square root for each weight. DeepSpeed copies the gradient.
    local = ceil(trained / (n if setup.zero or setup.fsdp else 1))
    temporary = 8 * min(local, ZERO3_SUB_GROUP) if setup.zero == 3 else (8 if setup.zero else 4) * local
    return {
        "weights": Phases.always(weights // (n if setup.sharded else 1)),
        "gradients": gradients,
        "optimizer": Phases.always(optimizer)._replace(step=optimizer + temporary),
        "communication buffers": buffers,
    }


def reference(shape: Shape, model: ModelConfig, beta: float, setup: Setup) -> Phases:
    """The frozen policy of the KL term: w P bytes (embedding: float32 under autocast), sharded where the policy is."""
    if beta == 0 or model.lora:  # without its adapters the policy is the reference
        return Phases()
    held = low_bytes(model) * shape.parameters + (2 * shape.embedding if autocast(model, setup) else 0)
    return Phases.always(held // (setup.gpus if setup.sharded else 1))


def computing(shape: Shape, model: ModelConfig, rollout: RolloutConfig, setup: Setup) -> Phases:
    """Copies of weights that a pass computes with, where they are held in another form.

    - ZeRO-3: in a pass up to `stage3_max_live_parameters` (or the embedding, if it is larger) and what is prefetched.
    - FSDP2: what belongs to no layer, and two layers.
    - Both in the rollout: all of them with `rollout.gather: phase`, as in a pass with `layer`.
    - With vLLM, in the rollout: a bucket of weights on their way to it, and the copies that are sent.
    - Else, float32 weights under autocast: a bfloat16 copy of a layer in the backward pass, of all trained matrices in
      the rollout, which autocast keeps. (At the end of the forward pass, too: see `activation_bytes`.)
    """
    low = low_bytes(model)
    everything = shape.parameters
    bucket = None
    if rollout.engine == "vllm":
        bucket = (1 + setup.sharded) * max(rollout.vllm.sync_bucket_mb * 2**20, low * shape.embedding)
    if setup.sharded:
        if setup.fsdp:
            live = everything - (shape.num_hidden_layers - 2) * shape.layer - shape.vision.depth * shape.vision.block
        else:
            live = max(ZERO3_LIVE, shape.embedding) + ZERO3_PREFETCH
        live = low * min(everything, live)
        return Phases(live, 0, bucket or (low * everything if rollout.gather == "phase" else live))
    if autocast(model, setup):
        return Phases(update=2 * shape.layer, rollout=bucket or cast_bytes(shape, model))
    return Phases(rollout=bucket or 0)
