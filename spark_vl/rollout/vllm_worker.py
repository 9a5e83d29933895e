"""What vLLM's workers are taught: to take weights while the engine lives.

A class for vLLM's `worker_extension_cls`: it becomes a base of the worker's own, and its methods are called on every
worker with `collective_rpc`, in the process (`VLLMConfig.mode: colocate`) or over HTTP, which carries JSON values.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import TCPStore

from spark_vl.rollout.weight_channel import WeightChannel


class WeightReceiver:
    """Methods of a vLLM worker. Weights arrive between `begin_weights` and `finish_weights`, in buckets."""

    def describe_model(self) -> dict[str, Any]:
        """What the worker serves: the facts that tell one model from another, and where it computes."""
        worker: Any = self
        config = worker.model_config.hf_config
        text = config.get_text_config()
        return {
            "model_type": config.model_type,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "dtype": str(worker.model_config.dtype).removeprefix("torch."),
            "max_model_len": worker.model_config.max_model_len,
            "logprobs_mode": worker.model_config.logprobs_mode,
            "device": worker.device.type,
        }

    def worker_id(self) -> dict[str, str]:
        """Another after each start of the server."""
        worker: Any = self
        return {"id": f"{os.getpid()}/{id(worker)}"}

    def connect_weights(self, host: str, port: int, name: str, first_rank: int, size: int, timeout_s: float) -> None:
        """Join the trainer's `WeightChannel`, as rank `first_rank` and this worker's own."""
        worker: Any = self
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        self.channel = WeightChannel(
            store,
            name=name,
            rank=first_rank + worker.rank,
            size=size,
            device=worker.device,
            timeout_s=timeout_s,
        )

    def begin_weights(self) -> None:
        """Make the layers take weights as they lie in a checkpoint."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        worker: Any = self
        initialize_layerwise_reload(worker.model_runner.get_model())

    def receive_weights(self, described: list[list[Any]]) -> None:
        """Take the next bucket from the channel."""
        self.load_bucket(self.channel.receive(described))

    def load_bucket(self, weights: list[tuple[str, Tensor]]) -> None:
        """Take weights; vLLM cuts out this worker's share. They are kept until their layer is complete."""
        from vllm.config import set_current_vllm_config

        worker: Any = self
        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.get_model().load_weights(weights)

    def finish_weights(self) -> None:
        """Sample from what has arrived."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        worker: Any = self
        with set_current_vllm_config(worker.vllm_config):
            finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)
