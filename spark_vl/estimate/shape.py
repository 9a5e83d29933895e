"""A model in numbers, and how many weights follow from them: a language model, maybe with a vision tower."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from spark_vl.data.cells import count

_MOST = 2**31
"""No number of a `config.json` is as large."""


@dataclass(frozen=True)
class VisionShape:
    """The vision tower, under the names of the Hugging Face configuration; of a model without one, all zeros."""

    depth: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    out_hidden_size: int = 0
    patch_size: int = 0
    temporal_patch_size: int = 0
    spatial_merge_size: int = 0
    in_channels: int = 0
    num_position_embeddings: int = 0
    """Learned positions of patches; 0: there are none."""
    deeper_mergers: int = 0
    """Mergers of inner layers, whose features go to layers of the language model."""
    gated: bool = True
    """Whether norms (RMSNorm) and the patch embedding have no biases, and the MLP is gated; if not, LayerNorm, a plain
    MLP, and biases everywhere."""

    @property
    def patch_values(self) -> int:
        """Numbers of a patch as the tower takes it; a still image is repeated over the temporal patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block(self) -> int:
        """Weights of a block: two norms, attention and an MLP."""
        width, inner = self.hidden_size, self.intermediate_size
        attention = _linear(width, 3 * width) + _linear(width, width)
        mlp = (2 if self.gated else 1) * _linear(width, inner) + _linear(inner, width)
        return 2 * self._norm(width) + attention + mlp

    @property
    def parameters(self) -> int:
        """Weights of the embeddings of patches and positions, the blocks and the mergers into the language model. The
        one at the end norms patches, those of inner layers what is merged."""
        width = self.hidden_size
        merged = width * self.spatial_merge_size**2
        merger = _linear(merged, merged) + _linear(merged, self.out_hidden_size)
        mergers = self._norm(width) + merger + self.deeper_mergers * (self._norm(merged) + merger)
        embeddings = (self.patch_values + self.num_position_embeddings + (not self.gated)) * width
        return embeddings + self.depth * self.block + mergers

    def _norm(self, width: int) -> int:
        return width if self.gated else 2 * width

    def image_tokens(self, pixels: int) -> int:
        """Tokens that an image of at most `pixels` becomes in the language model; each merges several patches."""
        return pixels // (self.patch_size * self.spatial_merge_size) ** 2 if self.depth else 0

    def patches(self, tokens: int) -> int:
        """Patches behind `tokens` image tokens."""
        return tokens * self.spatial_merge_size**2


@dataclass(frozen=True)
class Shape:
    """A whole model, under the names of the Hugging Face configuration."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    """Whether q, k and v have a bias."""
    qk_norm: bool
    """Whether the queries and keys of each head are normed."""
    tie_word_embeddings: bool
    vision: VisionShape

    @property
    def query_size(self) -> int:
        """Width of all queries of a token in one layer."""
        return self.head_dim * self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of all keys of a token, and of all its values, in one layer."""
        return self.head_dim * self.num_key_value_heads

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and again of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def layer(self) -> int:
        """Weights of a layer of the language model: two norms, attention and a gated MLP."""
        width, read = self.hidden_size, self.query_size + 2 * self.key_value_size
        attention = (width + self.attention_bias) * read + self.query_size * width + 2 * self.qk_norm * self.head_dim
        return 2 * width + attention + 3 * width * self.intermediate_size

    @property
    def parameters(self) -> int:
        """All weights; tied embeddings count once."""
        embeddings = self.embedding * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.layer + self.hidden_size + self.vision.parameters

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on the seven linear layers of each layer of the language model."""
        width, inner = self.hidden_size, self.intermediate_size
        sizes = 2 * (width + self.query_size) + 2 * (width + self.key_value_size) + 3 * (width + inner)
        return self.num_hidden_layers * rank * sizes


def shapes() -> dict[str, Shape]:
    """The shipped shapes, by their short names."""
    return {
        name: _shape(name, config, family)
        for family in _families().values()
        for name, config in family["shapes"].items()
    }


def load_shape(model: str) -> Shape:
    """The shape of `model`: short name or Hub id of a shipped one, or a folder with a Hugging Face `config.json`.

    Raises:
        ValueError: there is none, or it is of a model family that the kit does not know.
    """
    families = _families()
    for family in families.values():
        for name, config in family["shapes"].items():
            if model in (name, config["hub"]):
                return _shape(name, config, family)
    file = Path(model) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{model!r} is not a shape; allowed are {', '.join(shapes())}, their Hub ids, or a folder with a "
            "config.json"
        )
    try:
        config = _a("object", "the file", json.loads(file.read_text()))
        if (model_type := str(config.get("model_type"))) not in families:
            raise ValueError(f"model_type is {model_type!r:.80}; allowed: {', '.join(map(repr, families))}")
        return _shape(model, config, families[model_type])
    except KeyError as error:
        raise ValueError(f"{file}: {error.args[0]} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error


def _families() -> dict[str, dict[str, Any]]:
    """`model_type` → what the YAML file beside the model family's code says."""
    found = sorted(files("spark_vl.families").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text("utf-8"))
        for file in found
        if file.name.endswith(".yaml")
    }


def _shape(name: str, config: dict[str, Any], family: dict[str, Any]) -> Shape:
    """From a `config.json`: flat as on the Hub, or with a `text_config` as transformers 5 writes it."""
    text = family["text_config"] | _a("object", "text_config", config.get("text_config", config))
    width, heads = (count(text, name, least=1, below=_MOST) for name in ("hidden_size", "num_attention_heads"))
    text.setdefault("head_dim", width // heads)
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    vision = VisionShape()
    if "vision_config" in family:
        tower = family["vision_config"] | _a("object", "vision_config", config["vision_config"])
        inner_layers = family.get("inner_layers")  # the name of the list of them
        tower["deeper_mergers"] = len(_a("list", inner_layers, tower[inner_layers])) if inner_layers else 0
        vision = VisionShape(**_facts(VisionShape, tower))
    return Shape(name=name, **_facts(Shape, text), vision=vision)


def _facts(cls: type, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `cls` that are numbers or yes and no."""
    numbers = {field.name: count(config, field.name, below=_MOST) for field in fields(cls) if field.type == "int"}
    return numbers | {field.name: bool(config[field.name]) for field in fields(cls) if field.type == "bool"}


def _a(kind: Literal["list", "object"], name: str, value: Any) -> Any:
    if not isinstance(value, list if kind == "list" else dict):
        raise ValueError(f"{name}: found {value!r:.80}; allowed: of type {kind}")
    return value


def _linear(inputs: int, outputs: int) -> int:
    """Weights of a linear layer with a bias."""
    return (inputs + 1) * outputs
