"""The policy: a Hugging Face model that scores packs in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from spark_vl.config import ConfigError, LoraConfig, ModelConfig
from spark_vl.families.registry import find_family, get_family, load_configuration, load_part
from spark_vl.policy.head import ScoringHead, TokenScores
from spark_vl.policy.packing import Pack, attention_mask
from spark_vl.run.provenance import public_name

T = TypeVar("T")


class Policy(nn.Module):
    """A model as the trainer sees it.

    All that computes with its weights goes through its `forward`: DDP sees an ordinary step, and ZeRO-3 and FSDP2,
    which gather weights when a module is called, begin and end with the outermost one.

    Args:
        model: of one of the families of the registry. Its `lm_head` is replaced by a `ScoringHead` over the same
            weight.
        attention: back-end of the packed forward pass.
        temperature: of the sampling, so that log-probabilities are those of the distribution that was sampled from.
        suppressed_token_ids: tokens that are never sampled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Literal["sdpa", "flex"],
        temperature: float,
        suppressed_token_ids: Sequence[int],
    ) -> None:
        super().__init__()
        old = model.lm_head
        with torch.device("meta"):
            head = ScoringHead(old.in_features, old.out_features, bias=old.bias is not None)
        head.weight, head.bias = old.weight, old.bias  # the same Parameters: tied embeddings stay tied
        model.lm_head = head
        self.model = model
        self.family = get_family(model.config.model_type)
        self._no_split_modules = model._no_split_modules  # Accelerate asks what FSDP2 shards: these layers, each alone
        self.adapters: Any = None
        """The configuration of the adapters (a `peft.LoraConfig`); None: there are none."""
        self.attention = attention
        self.temperature = temperature
        self.suppressed: torch.Tensor
        self.register_buffer("suppressed", torch.tensor(list(suppressed_token_ids), dtype=torch.long), persistent=False)
        self.use_attention(attention)

    def use_attention(self, backend: Literal["sdpa", "flex"]) -> None:
        """Compute the language model's attention with `backend` from here on."""
        self.model.config.get_text_config()._attn_implementation = {"flex": "flex_attention"}.get(backend, backend)

    def forward(self, work: Pack | Callable[[], T], *, adapters: bool = True) -> TokenScores | T:
        """Score the N completion tokens of a pack, or do any other `work` on the model, such as a decoding step.

        Args:
            adapters: False: without the low-rank adapters, which is the reference policy.
        """
        if not isinstance(work, Pack):
            return work()
        if adapters:
            return self._score(work)
        with self._without_adapters():
            return self._score(work)

    def _score(self, pack: Pack) -> TokenScores:
        hidden_TH = self.family.hidden_states(
            self.model, pack.input_ids, pack.position_ids, attention_mask(pack, self.attention), pack.images
        )
        return self.model.lm_head(
            hidden_TH[pack.source_N],
            pack.target_N,
            temperature=self.temperature,
            suppressed=self.suppressed,
        )

    def plain_state_dict(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`state`, of this module, as the Hugging Face model's own, with the adapters merged into the weights. Of
        weights that are tied, one copy."""
        plain = {}
        tied = self.model.all_tied_weights_keys  # a copy → what it is a copy of
        for name, tensor in state.items():
            name = name.removeprefix("model.")
            if ".lora_" in name:
                continue
            if ".base_layer." in name:
                layer, weight = name.split(".base_layer.")
                name = f"{layer}.{weight}"
                if weight == "weight":
                    down, up = (state[f"model.{layer}.lora_{side}.default.weight"].double() for side in "AB")
                    adapted: Any = self.model.get_submodule(layer)  # a LoRA layer of peft
                    scaling = adapted.scaling["default"]
                    tensor = (tensor.double() + scaling * up @ down).to(tensor.dtype)
            if name not in tied:
                plain[name] = tensor
        return plain

    def adapter_state_dict(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The adapters in `state`, of this module, by the names that peft gives them beside a Hugging Face model."""
        return {
            f"base_model.{name.replace('.default.', '.')}": tensor.contiguous()
            for name, tensor in state.items()
            if ".lora_" in name
        }

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def load_policy(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    temperature: float,
    suppressed_token_ids: Sequence[int],
    trained: torch.dtype | None = None,
) -> Policy:
    """Load the checkpoint at `config.path`, from safetensors only and without any code of its own.

    Args:
        dtype: of the weights.
        trained: of those that are trained. An optimizer without float32 master weights needs float32 here: steps of
            5e-7 vanish in bfloat16. None: nothing is to be trained.

    Raises:
        ConfigError: see `find_family`; the weights cannot be read, or some are missing; they are adapters of another
            model; or adapters are asked for, and peft is not installed.
    """
    family = find_family(config)
    if find_adapter_config_file(config.path, revision=config.revision):
        raise ConfigError(
            f"model.path: {config.path}: holds adapters (adapter_config.json), which name another model to load; "
            "allowed: a whole model. Merge them into theirs"
        )
    settings = {
        "config": load_configuration(config),
        "dtype": dtype,
        "attn_implementation": "sdpa",
        "use_safetensors": True,
        "output_loading_info": True,
    }
    model, found = load_part(family.model_class, config, **settings)
    if missing := sorted(found["missing_keys"]):  # transformers would train random numbers
        raise ConfigError(
            f"model.path: {config.path}: the weights lack {len(missing)} of those that config.json asks for: "
            f"{', '.join(missing):.300}"
        )
    policy = Policy(
        model,
        attention=config.attention,
        temperature=temperature,
        suppressed_token_ids=suppressed_token_ids,
    )
    if trained is None:
        return policy
    if config.lora:
        policy.adapters = _add_adapters(model, family.adapter_targets, config.lora, trained)
        policy.adapters.base_model_name_or_path = public_name(config.path)
        policy.adapters.revision = config.revision
    if "vision" in config.freeze:
        family.freeze_vision(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers lets the embeddings ask for a gradient, which only the reentrant kind needs: a frozen vision
        # tower would then be run backward for nothing.
        model.disable_input_require_grads()
    return policy.train()


def _add_adapters(model: PreTrainedModel, targets: str, config: LoraConfig, dtype: torch.dtype) -> Any:
    """Give each layer whose name `targets` matches a trained adapter, and freeze all else. Returns their
    configuration, a `peft.LoraConfig`."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("model.lora: needs peft: pip install 'spark-vl[lora]'") from error
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    # Not `model.add_adapter`: transformers would then save nothing but the adapters.
    peft.inject_adapter_in_model(adapters, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapters
