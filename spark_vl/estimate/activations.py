"""What a pass computes with: the activations of an update; the key-value cache and the rest of a rollout.

Estimates, mostly upper bounds, compared with what torch allocates in `tests/test_estimate.py`. Where attention or a
convolution needs room inside its kernel, that is not counted. All results are bytes on one GPU.
"""

from __future__ import annotations

from spark_vl.config import ModelConfig
from spark_vl.estimate.shape import Shape
from spark_vl.estimate.weights import cast_bytes, low_bytes

LOGITS_AT_ONCE = 2**26
"""As `spark_vl.policy.head`: elements of the largest logits tensor."""


def activation_bytes(shape: Shape, model: ModelConfig, *, tokens: int, patches: int, cast: bool) -> int:
    """The largest sum of tensors that a pass over `tokens` with `patches` of images makes, an estimate.

    With b bytes of a number that is computed and r of one of the residual stream (4 under autocast, else b), a layer of
    width H and inner width I keeps for the backward pass

        T · (norms 2·(4 + 2b)·H [26·H under autocast] + attention 5b·Q + MLP 4b·I)  [+ b·T² with `sdpa`]

    (Q, the width of all queries, is H in most models; attention: q, and k and v repeated for all heads, and the output
    before and after it is put together; norms of q and k count as norms; `sdpa` turns the mask into numbers of the type
    of q). Its gradients add 2b·I·T. A block of the vision tower is the same but for attention, 7b·H (qkv, rotated q and
    k, two outputs), and an MLP without a gate, 2b·I, and has no mask. Float32 adapters under autocast add 4·I·T.

    With gradient checkpointing all layers keep their input, r·H·T, and the largest of these is added: one layer, one
    block, the head, and, under autocast, the bfloat16 copies of all weights, which are there until the forward pass
    ends, with its last MLP. Without, all layers keep everything.

    The head takes 5 tensors of `LOGITS_AT_ONCE` float32 numbers and the gradient of its weight. Beside it all there are
    pixels (float32, and b; if the vision tower is not trained, only until it has run), the boolean mask, T², and four
    tensors of the size of the hidden states.

    Args:
        cast: whether autocast computes (`autocast`).
    """
    low = low_bytes(model)
    stream = 4 if cast and not model.lora else low  # the embedding is frozen and bfloat16 with adapters
    vision = shape.vision
    width, inner = shape.hidden_size, shape.intermediate_size

    norms = 26 if stream > low else 2 * (4 + 2 * low)

    def kept(size: int, inner: int, attention: int, gated: bool = True) -> int:
        """Bytes that a layer keeps for one token, `attention` numbers of them in attention."""
        return norms * size + low * (attention + (4 if gated else 2) * inner)

    mask = tokens**2 if model.attention == "sdpa" else 0
    layer = tokens * kept(width, inner, 5 * shape.query_size) + low * mask
    layer += shape.qk_norm * tokens * norms // 2 * (shape.query_size + shape.key_value_size)
    block = patches * kept(vision.hidden_size, vision.intermediate_size, 7 * vision.hidden_size, vision.gated)
    gradients = 2 * low * inner * tokens
    if cast and model.lora:
        gradients += 4 * inner * tokens  # the input of a float32 adapter
    block_gradients = 2 * low * vision.intermediate_size * patches
    head = 5 * 4 * min(tokens * shape.vocab_size, LOGITS_AT_ONCE)
    if not model.lora:
        head += shape.embedding * (4 if cast else low)
    pixels = vision.patch_values * patches
    always = mask + 4 * tokens * width * stream
    copies = cast_bytes(shape, model) + 3 * low * inner * tokens if cast else 0
    trained_vision = not (model.lora or "vision" in model.freeze)
    if trained_vision:
        always += 4 * pixels + (low * pixels if low < 4 else 0)
        block_inputs = vision.depth * patches * vision.hidden_size * stream
    else:
        block, block_gradients, block_inputs = 4 * pixels + patches * vision_forward_bytes(shape, low, stream), 0, 0
    largest = max(gradients, head, copies, block + block_gradients)
    if not model.gradient_checkpointing:
        return always + shape.num_hidden_layers * layer + (vision.depth * block if trained_vision else 0) + largest
    layer_inputs = shape.num_hidden_layers * tokens * width * stream
    return always + layer_inputs + block_inputs + max(largest, layer + gradients)


def vision_forward_bytes(shape: Shape, low: int, stream: int) -> int:
    """Bytes for each patch that a vision tower without gradients adds to its float32 pixels: a cast of them, twice the
    residual stream, and the inner tensors of a gated MLP or 36 bytes of attention, which rotates q and k in float32,
    for each of its width."""
    vision = shape.vision
    pixels = low * vision.patch_values if low < 4 else 0
    return pixels + 2 * stream * vision.hidden_size + max(3 * low * vision.intermediate_size, 36 * vision.hidden_size)


def rollout_bytes(
    shape: Shape, model: ModelConfig, *, prompts: int, n: int, prompt: int, image: int, new: int, cast: bool
) -> tuple[int, int]:
    """Bytes of the key-value cache at its longest, and what is computed with beside it, estimates.

    The cache holds (prompt + new) · layers · 2 · key-value width numbers for each of `prompts · n` rows; under autocast
    they are float32, for the rotary embedding is computed in the type of the residual stream. Decoding repeats the keys
    and values of one layer for all heads (and casts them, under autocast), and has 4 float32 tensors of logits. The
    prefill runs all prompts at once: the inner tensors of an MLP, or q, k and v of all heads and their mask, and four
    tensors of hidden states; the vision tower runs all images at once.

    Args:
        prompt: tokens of each prompt, `image` of which are of images.
        new: tokens of each completion.
        cast: whether autocast computes (`autocast`).
    """
    low = low_bytes(model)
    stream = 4 if cast and not model.lora else low
    rows, longest = prompts * n, prompt + new
    cache = rows * longest * shape.num_hidden_layers * 2 * shape.key_value_size * stream
    repeated = rows * longest * 2 * shape.query_size * (stream + (low if stream > low else 0))
    decoding = repeated + 4 * 4 * rows * shape.vocab_size
    tokens, mask = prompts * prompt, prompts * prompt**2
    prefill = max(3 * low * shape.intermediate_size * tokens, 5 * low * shape.query_size * tokens + low * mask)
    prefill += mask + 4 * stream * shape.hidden_size * tokens
    patch = 4 * shape.vision.patch_values + vision_forward_bytes(shape, low, stream)
    encode = prompts * shape.vision.patches(image) * patch
    # Before it is full, the cache is empty (images), or holds the prompts alone and once each (prefill).
    return cache, max(decoding, encode - cache, prefill - cache + cache * prompt // (longest * n))
