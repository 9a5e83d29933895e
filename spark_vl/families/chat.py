"""What processors of chat models have in common: a tokenizer, and a chat template that shows messages with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from transformers import GenerationConfig

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.families.base import ModelInputs, ProcessedPrompt
from spark_vl.records import BadRecordError, Content, Message, PromptRecord, writable

QUESTION = "Which digit is this?"
P = TypeVar("P", bound="ChatProcessor")


def or_config_error(config: ModelConfig, make: Callable[[], P]) -> P:
    """The processor that `make` makes of the files at `config.path`, its chat template tried.

    Raises:
        ConfigError: a file says what cannot be.
    """
    try:
        processor = make()
        processor.check_chat_template()
    except ValueError as error:
        raise ConfigError(f"model.path: {config.path}: {error}") from error
    except Exception as error:  # numbers that are none, or not of this world
        raise ConfigError(f"model.path: {config.path}: {type(error).__name__}: {error}") from error
    return processor


def behind_thought(text: str, marks: tuple[str, str], *, begun: bool = False) -> int:
    """Where in `text` the answer begins, behind the last chain of thought. One that does not end has no answer behind
    it: the length of `text`.

    Args:
        marks: what begins and what ends a chain of thought.
        begun: whether one has begun before `text`.
    """
    _, end, behind = text.rpartition(marks[1])
    if _is_unfinished(text, marks) or (not end and begun):
        return len(text)
    return len(text) - len(behind.lstrip()) if end else 0


def _is_unfinished(text: str, marks: tuple[str, str]) -> bool:
    return text.rfind(marks[0]) > text.rfind(marks[1])


class ChatProcessor(ABC):
    """The part of a `Processor` that needs no images.

    Args:
        hf: the Hugging Face processor, or the tokenizer of a model without one.
        tokenizer: its tokenizer.
        generation_config: names stop tokens; the token that ends a turn of the chat is one too.
        max_prompt_tokens: longer prompts are refused.
        commit: see `Processor`.

    Raises:
        ValueError: the chat template fails, or no token ends a completion.
    """

    example: ClassVar[Content] = (QUESTION,)
    """A question, which the chat template is tried on."""
    thought: ClassVar[tuple[str, str] | None] = None
    """What begins and what ends a chain of thought, in models that mark it."""
    suppressed_token_ids: tuple[int, ...] = ()
    padding: ModelInputs

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        generation_config: GenerationConfig,
        *,
        max_prompt_tokens: int,
        commit: str | None = None,
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.commit = commit
        self.max_prompt_tokens = max_prompt_tokens
        self.pad_token_id: int = tokenizer.pad_token_id
        self.stop_token_ids = self._stop_tokens(generation_config)
        self.check_tokens("generation_config.json: eos_token_id", self.stop_token_ids)
        self.check_tokens("tokenizer_config.json: pad_token", [self.pad_token_id])
        asked = self.chat([Message("user", self.example)])
        self._thinks_when_asked = self.thought is not None and _is_unfinished(asked, self.thought)

    @abstractmethod
    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """See `Processor.process`."""

    @abstractmethod
    def chat_message(self, message: Message) -> dict[str, Any]:
        """`message` as the chat template takes it."""

    def example_parts(self) -> dict[str, str]:
        """What the chat template must show of `example`, each once: what it is called → its text."""
        return {"a question": QUESTION}

    def check_tokens(self, name: str, ids: Sequence[int]) -> None:
        """Raises a ValueError that names `name` unless `ids` are tokens of the vocabulary, one or more."""
        tokens = set(self.tokenizer.get_vocab().values())
        if not ids or not all(type(number) is int and number in tokens for number in ids):
            raise ValueError(f"{name}: found {ids!r:.80}; allowed: tokens of the vocabulary")

    def check_chat_template(self) -> None:
        """Try the chat template on one question.

        Raises:
            ValueError: it fails, or does not show the question, or does not show its image once.
        """
        chat = self.chat([Message("user", self.example)])
        found = {name: chat.count(text) for name, text in self.example_parts().items()}
        if set(found.values()) != {1}:
            shown = ", and ".join(f"{name} {count} times" for name, count in found.items())
            raise ValueError(f"chat_template: shows {shown}; allowed: each once")

    def chat(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """The text that the chat template makes of `messages`, and `ask`s for a reply to them.

        Raises:
            ValueError: it fails.
        """
        try:
            return self.hf.apply_chat_template(
                [self.chat_message(message) for message in messages], tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"chat_template: fails with {type(error).__name__}: {error}") from error

    def chat_of(self, record: PromptRecord) -> str:
        """The text of a record's messages.

        Raises:
            BadRecordError: the chat template fails on it, or no tokenizer takes it.
        """
        try:
            chat = self.chat(record.messages)
        except ValueError as error:
            raise BadRecordError(record.id, str(error)) from error
        if writable(chat) != chat:
            raise BadRecordError(record.id, "the prompt is not valid Unicode")
        return chat

    def tokens_of(self, text: str) -> Tensor:
        """[T] int64: the tokens of a chat."""
        return self.tokenizer(text, return_tensors="pt")["input_ids"][0]

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Processor.decode`."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        """See `Processor.encode`."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_start(self, text: str) -> int:
        """See `Processor.answer_start`."""
        return behind_thought(text, self.thought, begun=self._thinks_when_asked) if self.thought else 0

    def render(self, prompt: ProcessedPrompt) -> str:
        """See `Processor.render`."""
        return self.tokenizer.decode(prompt.input_ids.tolist())

    def unexpanded(self, prompt: ProcessedPrompt) -> list[int]:
        """See `Processor.unexpanded`."""
        return prompt.input_ids.tolist()

    def save(self, folder: Path) -> None:
        """See `Processor.save`."""
        self.hf.save_pretrained(folder)

    def _stop_tokens(self, generation_config: GenerationConfig) -> tuple[int, ...]:
        """Those of the configuration, and the one that the chat template writes behind a reply: a base model's
        configuration names the end of a text only, and a fine-tuned one may have lost its own."""
        named = generation_config.eos_token_id
        stop = named if isinstance(named, list) else [] if named is None else [named]
        reply = "The digit is seven."
        chat = [Message("user", self.example), Message("assistant", (reply,))]
        behind = self.chat(chat, ask=False).rpartition(reply)[2]
        end = self.tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        stop += [token for token in end if token in self.tokenizer.added_tokens_decoder and token not in stop]
        if not stop:
            raise ValueError(
                "nothing ends a completion: generation_config.json has no eos_token_id, and the chat template ends a "
                "reply without a special token; name the token that does as eos_token_id"
            )
        return tuple(stop)
