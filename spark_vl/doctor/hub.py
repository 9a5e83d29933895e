"""Whether the Hugging Face Hub can be reached, and as whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool

from spark_vl.doctor.finding import Finding, fault, ok, warning

_SECONDS = 4.0


def hub() -> Iterator[Finding]:
    """One request to the endpoint, with the token if there is one."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.HF_HUB_OFFLINE:
        yield warning(
            "Hub",
            "offline mode is on",
            follows="models and datasets come from the cache only, and nothing can be published",
            fix="unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE",
        )
        return
    endpoint = re.sub("//[^/]*@", "//", constants.ENDPOINT)  # without a password
    token = get_token()

    def ask() -> str | int:
        """Whose token it is, or the status of an answer that does not tell."""
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(), timeout=_SECONDS)
        return answer.json()["name"] if answer.status_code == 200 else answer.status_code

    try:
        # In a thread, because the client's time-out does not cover the look-up of the host's name.
        with ThreadPool(1) as pool:
            answer = pool.apply_async(ask).get(_SECONDS)
    except (HTTPError, TimeoutError) as error:
        reason = re.sub("Bearer .*", "Bearer …", f"{error}") or f"no answer in {_SECONDS:.0f} seconds"
        yield warning(
            "Hub",
            f"{endpoint} cannot be reached: {reason}",
            follows="what is not in the cache cannot be loaded, and nothing can be published",
            fix="check the network, HTTPS_PROXY, HF_ENDPOINT; where there is no network: export HF_HUB_OFFLINE=1",
        )
        return
    match answer:
        case str():
            yield ok("Hub", f"{endpoint}, logged in as {answer}")
        case 401 | 403 if token:
            yield fault(
                "Hub",
                f"{endpoint} does not accept the token",
                follows="with it downloads are refused, also those that need none",
                fix="hf auth login --force; or unset HF_TOKEN, if that is set",
            )
        case 401 | 403:
            yield warning(
                "Hub",
                f"{endpoint}, not logged in",
                follows="gated models cannot be loaded, and nothing can be published",
                fix="hf auth login",
            )
        case _:
            yield warning("Hub", f"{endpoint} answers {answer}", follows="downloads and publishing may fail")
