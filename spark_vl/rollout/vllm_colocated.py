"""vLLM in the training process, on its device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from spark_vl.policy.weights import Bucket
from spark_vl.records import BadRecordError
from spark_vl.rollout.engine import EngineError
from spark_vl.rollout.vllm_requests import ON_CPU, Asked, Completion, Generate, OnGroup, Read


class Colocated:
    """A vLLM engine in this process; with `tensor_parallel` above 1 one engine over that many neighbors.

    It reads the checkpoint although the policy's weights follow: without files (`load_format="dummy"`) vLLM fills also
    with random numbers what it computes itself and no trainer has (0.32: the normalization of pixels).

    It sleeps while others need the device (CUDA): weights in host memory, no key-value cache.

    Args:
        arguments: of vLLM's `LLM`, see `vllm_requests.serving_arguments`.
        tensor_parallel: processes that share an engine. They must make the same calls with the same arguments.

    Raises:
        EngineError: vLLM cannot start.
    """

    def __init__(self, arguments: Mapping[str, Any], accelerator: Accelerator, *, tensor_parallel: int) -> None:
        # Read by vLLM when it starts. The engine has to live in this process: its weights are set by calls.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # The trainer's threads stay where they are.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.device_type = accelerator.device.type
        self.sleeps = self.device_type == "cuda"
        self._awake: set[str] = set()
        launched: dict[str, Any] = dict(ON_CPU) if self.device_type == "cpu" else {}
        if accelerator.num_processes > 1:
            os.environ["RANK"], os.environ["LOCAL_RANK"] = (
                str(accelerator.process_index),
                str(accelerator.local_process_index),
            )
            os.environ["WORLD_SIZE"] = str(accelerator.num_processes)
            launched["distributed_executor_backend"] = "external_launcher"
        from vllm import LLM

        threads = torch.get_num_threads()
        try:
            self.llm = LLM(
                **arguments,
                **launched,
                tensor_parallel_size=tensor_parallel,
                enable_sleep_mode=self.sleeps,
            )
        except Exception as error:  # vLLM raises what its parts raise
            raise EngineError(f"vLLM does not start: {type(error).__name__}: {error}") from error
        finally:
            torch.set_num_threads(threads)
        self.model = self.llm.collective_rpc("describe_model")[0]
        self._sleep()

    def load(self, buckets: Iterable[Bucket], version: str) -> None:
        """See `vllm_requests.Backend.load`."""
        failed: Exception | None = None
        try:
            self._wake("weights")
            self.llm.collective_rpc("begin_weights")
        except Exception as error:  # vLLM raises what its parts raise
            failed = error
        for bucket in buckets:
            try:
                if not failed:
                    self.llm.collective_rpc("load_bucket", args=(bucket,))
            except Exception as error:  # all buckets are taken all the same: other processes gather them too
                failed = error
        if failed:
            raise EngineError(f"vLLM does not take the weights: {type(failed).__name__}: {failed}") from failed
        self.llm.collective_rpc("finish_weights")
        # What was computed from the old ones: prompts, and images.
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.llm_engine.engine_core.set_weight_version(version)

    def generate(self, asked: Sequence[Asked], read: Read, on_group: OnGroup) -> dict[int, BadRecordError]:
        """See `vllm_requests.Backend.generate`."""
        with torch.autocast(self.device_type, enabled=False):  # that is the trainer's
            return self._generate(asked, read, on_group)

    def _generate(self, asked: Sequence[Asked], read: Read, on_group: OnGroup) -> dict[int, BadRecordError]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError, VLLMError

        self._wake("weights", "kv_cache")
        running: dict[str, int] = {}
        refused: dict[int, BadRecordError] = {}
        try:
            for i, (prompt, tokens, settings) in enumerate(asked):
                request: dict[str, Any] = {"prompt_token_ids": tokens}
                if prompt.images:
                    request["multi_modal_data"] = {"image": [image.resized for image in prompt.images]}
                params = SamplingParams(**settings)
                try:
                    [name] = self.llm.enqueue([request], params, use_tqdm=False)
                except (ValueError, VLLMClientError) as error:  # too long, or too many images
                    refused[i] = BadRecordError(prompt.record.id, f"vLLM refuses the prompt: {error}")
                else:
                    running[name.rpartition("-")[0] or name] = i  # answers bear the name without its random part
            while self.llm.llm_engine.has_unfinished_requests():
                for output in self.llm.llm_engine.step():
                    if output.finished:
                        i = running.pop(output.request_id)
                        try:
                            on_group(
                                i, read(i, output.prompt_token_ids, [_completion(each) for each in output.outputs])
                            )
                        except BadRecordError as error:
                            refused[i] = error
        except EngineError:
            raise
        except (RuntimeError, VLLMError) as error:  # out of memory among them
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        finally:
            if running:
                self.llm.llm_engine.abort_request(list(running))
            self._sleep()
        if running:
            raise EngineError(f"vLLM has not answered {len(running)} of {len(asked)} prompts")
        return refused

    def each(self) -> Sequence[tuple[str, Generate]]:
        """See `vllm_requests.Backend.each`."""
        return [("vLLM", self.generate)]

    def close(self) -> None:
        """Give the device back."""
        self.llm.llm_engine.engine_core.shutdown()

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)
            self._awake.clear()

    def _wake(self, *parts: str) -> None:
        if self.sleeps and (asleep := [part for part in parts if part not in self._awake]):
            self.llm.wake_up(tags=asleep)  # which does nothing at all where one of them is awake
            self._awake.update(asleep)


def _completion(output: Any) -> Completion:
    return Completion(
        token_ids=output.token_ids,
        logprobs=[at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)],
        finish_reason=output.finish_reason,
        versions=frozenset(span.version for span in output.weight_versions or ()),
    )
