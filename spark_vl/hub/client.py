"""The way to the Hub: which token is used, what is tried again, and errors in words that say what to do."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, SpaceInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, parse_ratelimit_headers, validate_repo_id

from spark_vl.config import ConfigError, read_token

logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset", "space"]

TIMEOUT_S = 60.0
"""Seconds without a byte after which a request is given up; huggingface_hub itself waits for ever."""

_WAITS_S = (1, 2, 4)
"""Before each new try of a call that failed for a passing reason. The client tries uploads again on its own before."""
_LONGEST_WAIT_S = 300
_PASSING = (408, 429, 500, 502, 503, 504)

Result = TypeVar("Result")
Info = ModelInfo | DatasetInfo | SpaceInfo


class HubError(RuntimeError):
    """The Hub refused something or could not be reached. Local files are untouched; publishing again continues."""


@dataclass(frozen=True)
class Token:
    """A token, and where it was found."""

    value: str | None
    source: str


def find_token(token_from: str | None, option: str = "--token-from") -> Token:
    """The token in what `token_from` names: `env:NAME` or `file:PATH`. None: that of `HF_TOKEN` or `hf auth login`.

    Args:
        option: which names `token_from`, for messages.

    Raises:
        HubError: no token is found there.
    """
    if token_from is None:
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        value = get_token()
        if value is None:
            raise HubError(f"no token was found: log in with `hf auth login`, set HF_TOKEN, or give {option}")
        return Token(value, source)
    try:
        return Token(read_token(token_from, option), token_from)
    except ConfigError as error:
        raise HubError(str(error)) from error


def check_repo_name(repo: str, option: str = "--repo") -> None:
    """Raises:
    HubError: `repo`, which `option` names, is not `ORG/NAME` in the spelling that the Hub allows.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{option}: {error}") from error
    if repo.count("/") != 1:
        raise HubError(f"{option}: found {repo!r}; allowed: ORG/NAME or USER/NAME")


class Hub:
    """Calls to one repository.

    Args:
        token: of someone who may write there.
        repo: `ORG/NAME`.
    """

    def __init__(self, token: Token, repo: str, repo_type: RepoType) -> None:
        self.api = HfApi(token=token.value, library_name="spark-vl")
        self.repo, self.repo_type = repo, repo_type
        self._token = token

    def call(self, doing: str, function: Callable[..., Result], *args: Any, **settings: Any) -> Result:
        """`function(*args, **settings)`, tried again while the Hub is busy or cannot be reached.

        Args:
            doing: what the call does, for messages.

        Raises:
            HubError: it failed for good.
        """
        for wait in (*_WAITS_S, None):
            get_session().timeout = TIMEOUT_S  # each time: after a lost connection the client makes a new session
            try:
                return function(*args, **settings)
            except OfflineModeIsEnabled as error:
                raise HubError(f"{doing}: offline mode is on; unset HF_HUB_OFFLINE to publish") from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                if wait is None or status not in _PASSING:
                    raise HubError(f"{doing}: {self._explained(error)}") from error
                wait = max(wait, _retry_after(error))
                reason = f"the Hub answered {status}"
            except HTTPError as error:  # it did not answer
                reason = f"{type(error).__name__}: {error}"
                if wait is None:
                    raise HubError(f"{doing}: {self._out_of_reach(error)}") from error
            except RuntimeError as error:  # of one file, whose sending the client has tried again long enough
                raise HubError(f"{doing}: {error} {self._explained_cause(error)}") from error
            except ValueError as error:  # metadata of a card that the Hub does not take, a part of a batch refused
                raise HubError(f"{doing}: {error}") from error
            logger.warning("%s: %s; tried again in %d s", doing, reason, wait)
            time.sleep(wait)
        raise AssertionError("the last try either returned or raised")

    def info(self, revision: str | None = None) -> Info | None:
        """What is in the repository at `revision` (None: main). None: it does not exist, or the token cannot see it.

        Raises:
            HubError: see `call`.
        """

        def ask() -> Info | None:
            try:
                match self.repo_type:
                    case "model":
                        return self.api.model_info(self.repo, revision=revision, timeout=TIMEOUT_S)
                    case "dataset":
                        return self.api.dataset_info(self.repo, revision=revision, timeout=TIMEOUT_S)
                    case "space":
                        return self.api.space_info(self.repo, revision=revision, timeout=TIMEOUT_S)
            except RepositoryNotFoundError:
                return None

        return self.call(f"looking at {self.repo}", ask)

    def _explained(self, error: HfHubHTTPError) -> str:
        status, said = error.response.status_code, _said(error)
        namespace = self.repo.partition("/")[0]
        match status:
            case 401:
                return f"401: the Hub does not accept {self._whose()}, or hides the repository from it{said}"
            case 403 if re.search("storage|quota|limit", said, re.IGNORECASE):
                return f"403: the storage of {namespace} is used up{said}; free some or buy more, then publish again"
            case 403:
                return (
                    f"403: {self._whose()} may not do that in {namespace!r}; it needs the scope 'write' (fine-grained "
                    f"tokens: write access to the repositories of {namespace!r}){said}"
                )
            case 404:
                return (
                    f"404: there is no user or organization {namespace!r} or no repository {self.repo!r} that "
                    f"{self._whose()} can see{said}"
                )
            case 409:
                return f"409: somebody else is changing {self.repo!r}; publish again{said}"
            case 413:
                return f"413: a file is larger than the Hub takes{said}"
            case 429:
                return f"429: too many requests, also after waiting; publish again later{said}"
            case _:
                return f"the Hub answered {status}{said}"

    def _explained_cause(self, error: RuntimeError) -> str:
        match error.__cause__:
            case HfHubHTTPError() as cause:
                return self._explained(cause)
            case HTTPError() as cause:
                return self._out_of_reach(cause)
            case cause:
                return "" if cause is None else str(cause)

    def _out_of_reach(self, error: HTTPError) -> str:
        return (
            f"{self.api.endpoint} cannot be reached ({type(error).__name__}: {error}), also when tried several times; "
            "publish again when it can"
        )

    def _whose(self) -> str:
        """The token in words: where it is from, whose it is, and what it may do, if the Hub tells."""
        found = f"the token from {self._token.source}"
        try:
            answer = self.api.whoami()
        except HTTPError:
            return f"{found} (of whom, the Hub does not tell: it may be mistyped, expired or revoked)"
        token = answer.get("auth", {}).get("accessToken", {})
        name, role = token.get("displayName"), token.get("role")
        return f"{found} ({name and f'{name!r} '}of {answer['name']!r}, scope {role!r})"


def _said(error: HfHubHTTPError) -> str:
    """What the Hub itself said, if anything, and the number under which it knows the request."""
    parts = [error.server_message and f'it said: "{error.server_message}"', error.request_id and error.request_id]
    said = ", request ".join(part for part in parts if part)
    return f" ({said})" if said else ""


def _retry_after(error: HfHubHTTPError) -> int:
    """Seconds that the Hub asks to wait."""
    value = error.response.headers.get("retry-after", "")
    asked = int(value) if value.isdecimal() else 0
    limit = parse_ratelimit_headers(error.response.headers)
    if limit and not limit.remaining:
        asked = max(asked, limit.reset_in_seconds)
    return min(asked, _LONGEST_WAIT_S)
