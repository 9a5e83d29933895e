"""What the Hub and the network do wrong: each time a clear error, local files as they were, and publishing again
finishes the job."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from tests.hub.driver import Refused
from tests.hub.fixtures import digests
from tests.hub.server import HubServer

CREATE, PREUPLOAD, BATCH, COMMIT = "/api/repos/create", "/preupload/", "/info/lfs/objects/batch", "/commit/"


@pytest.fixture
def publish(call, finished_run) -> Callable[..., dict]:
    """Publish the run's model, and see that no file of the run changes by that."""
    before = digests(finished_run)
    yield lambda **settings: call("publish_model", checkpoint=finished_run, repo="org/tiny", **settings)
    assert digests(finished_run) == before


def is_whole(hub: HubServer, run) -> bool:
    """Whether the repository holds the release."""
    files = hub.repo("model", "org/tiny").at().files
    names = ("model.safetensors", "tokenizer.json", "chat_template.jinja")
    return {"README.md", "curves.png"} < files.keys() and all(
        files[name].content == (run / "model" / name).read_bytes() for name in names
    )


def refusal(status: int, said: str = "", **headers: str) -> dict:
    return {"status": status, "body": said, "headers": headers}


@pytest.mark.parametrize(
    ("method", "path", "spoilt", "says"),
    [
        ("POST", CREATE, refusal(401, "Invalid credentials"), r"401: the Hub does not accept the token from HF_TOKEN"),
        ("POST", CREATE, refusal(403, "no rights"), r"403: the token from HF_TOKEN \(.*'tester'.*may not.*'write'"),
        ("POST", CREATE, refusal(404, "no such namespace"), r"404: there is no user or organization 'org' or no repos"),
        ("POST", CREATE, refusal(402, "pay first"), r'answered 402 .*it said: "pay first"'),
        (
            "POST",
            COMMIT,
            refusal(409, "busy"),
            r"409: somebody else is changing 'org/tiny'; publish again",
        ),
        ("POST", COMMIT, refusal(413, "too large"), r"413: a file is larger than the Hub takes"),
        ("POST", BATCH, refusal(403, "Private storage limit reached"), r"403: the storage of org is used up"),
        ("POST", COMMIT, refusal(400, "bad card"), r'answered 400 .*it said: "bad card"'),
        ("PUT", "^/lfs/", refusal(403, "expired"), r"Error while uploading '.*' to the Hub\. 403: .*may not do that"),
        ("POST", "/validate-yaml", refusal(400, "license is none"), r"Invalid metadata in README\.md"),
    ],
)
def test_refusals_are_explained_and_final(hub, publish, finished_run, method, path, spoilt, says):
    hub.misbehave(method, path, times=None, **spoilt)
    with pytest.raises(Refused, match=says) as refused:
        publish()
    assert refused.value.kind == "HubError"
    asked = [request for request in hub.requests if request.method == method and re.search(path, request.path)]
    assert len({request.path for request in asked}) == len(asked) > 0, "what will not pass is not tried again"
    hub.behave()
    publish()
    assert is_whole(hub, finished_run)


@pytest.mark.parametrize(
    ("method", "path", "how"),
    [
        ("POST", CREATE, refusal(503)),
        ("POST", CREATE, {"how": "cut"}),
        ("POST", PREUPLOAD, refusal(500)),
        ("POST", BATCH, refusal(502)),
        ("PUT", "", refusal(504)),
        ("PUT", "", {"how": "cut"}),
        ("POST", COMMIT, refusal(503)),
        ("POST", COMMIT, {"how": "cut"}),
        ("POST", COMMIT, {"how": "cut_response"}),
        ("GET", "/api/models/org/tiny", {"how": "cut_response"}),
        ("POST", "/paths-info/", refusal(503)),
    ],
)
def test_what_passes_is_tried_again(hub, publish, finished_run, method, path, how):
    rule = hub.misbehave(method, path, **how)
    publish()
    assert rule.reached.is_set()
    assert is_whole(hub, finished_run)
    assert len(hub.repo("model", "org/tiny").commits) == 2, "one by the Hub, one release"


def test_a_busy_hub_is_given_the_time_that_it_asks_for(hub, publish, finished_run):
    hub.misbehave("POST", COMMIT, **refusal(429, "slow down", **{"Retry-After": "1"}))
    start = time.monotonic()
    publish()
    assert time.monotonic() - start >= 1
    assert is_whole(hub, finished_run)


def test_the_time_until_its_limit_is_lifted_is_waited_for(hub, publish, finished_run):
    hub.misbehave("POST", COMMIT, **refusal(429, "slow down", **{"RateLimit": '"api";r=0;t=1'}))
    start = time.monotonic()
    publish()
    assert time.monotonic() - start >= 1
    assert is_whole(hub, finished_run)


def test_a_hub_that_stays_broken_ends_in_an_error(hub, publish, finished_run):
    hub.misbehave("POST", CREATE, times=None, status=503, body="maintenance")
    with pytest.raises(Refused, match=r'creating org/tiny: the Hub answered 503 .*it said: "maintenance"'):
        publish()
    assert len([request for request in hub.requests if CREATE in request.path]) == 4
    hub.behave()
    publish()
    assert is_whole(hub, finished_run)


def test_a_silent_hub_is_not_waited_for_for_ever(hub, publish, finished_run):
    hub.misbehave("POST", CREATE, times=None, how="slow", seconds=4.0)
    with pytest.raises(Refused, match=r"cannot be reached \(ReadTimeout.*publish again when it can"):
        publish(timeout_s=0.5)
    hub.behave()
    hub.misbehave("PUT", "", how="slow", seconds=4.0)
    publish(timeout_s=1.5)
    assert is_whole(hub, finished_run)


def test_the_token_that_is_blamed_is_the_one_that_was_used(hub, publish):
    with pytest.raises(Refused, match=r"the token from env:SECOND_TOKEN \(.*of 'tester', scope 'read'\) may not"):
        publish(token_from="env:SECOND_TOKEN")


@pytest.mark.parametrize(
    ("token_from", "says"),
    [
        ("env:NO_SUCH_VARIABLE", r"the environment variable 'NO_SUCH_VARIABLE' is not set"),
        ("file:/no/such/file", r"cannot read the token: .*No such file"),
        ("hf_" + "x" * 34, r"found a token itself; allowed: env:NAME, file:PATH"),
        ("HF_TOKEN", r"found 'HF_TOKEN'; allowed: env:NAME, file:PATH"),
    ],
)
def test_a_token_that_is_not_there(hub, publish, token_from, says):
    with pytest.raises(Refused, match=f"--token-from: {says}") as refused:
        publish(token_from=token_from)
    assert "x" * 34 not in str(refused.value)
    assert not hub.requests


@pytest.mark.parametrize("name", ["tiny", "org/tiny/extra", "org/ti ny", "org/tiny.git", "org--x/tiny", "", "../tiny"])
def test_a_name_that_no_repository_can_have(hub, call, finished_run, name):
    with pytest.raises(Refused, match=r"--repo: "):
        call("publish_model", checkpoint=finished_run, repo=name)
    assert not hub.requests


def test_another_commit_comes_first(hub, publish, finished_run):
    hub.misbehave("POST", COMMIT, how="race", path_in_repo="NOTES.md", content=b"theirs")
    publish()
    assert is_whole(hub, finished_run)
    assert hub.repo("model", "org/tiny").at().files["NOTES.md"].content == b"theirs"


def test_others_commit_all_the_time(hub, publish, finished_run):
    hub.misbehave("POST", COMMIT, times=None, how="race")
    with pytest.raises(Refused, match=r"org/tiny: other commits came first 3 times"):
        publish()
    hub.behave()
    publish()
    assert is_whole(hub, finished_run)


@pytest.mark.parametrize(("method", "path"), [("PUT", ""), ("POST", COMMIT)])
def test_what_was_damaged_on_the_way_is_noticed(hub, publish, finished_run, method, path):
    hub.misbehave(method, path, how="corrupt")
    with pytest.raises(Refused, match=r"1 of \d+ files do not have the hash of what was sent \(.*publish again"):
        publish()
    publish()
    assert is_whole(hub, finished_run)


def test_no_network(hub, spark_vl, finished_run):
    down = spark_vl(
        "publish", "model", finished_run, "--repo", "org/tiny", imported={"HF_ENDPOINT": "http://127.0.0.1:9"}
    )
    assert down.returncode == 1
    assert "not published: looking at org/tiny: http://127.0.0.1:9 cannot be reached (ConnectError" in down.stderr
    assert "Traceback" not in down.stderr
    offline = spark_vl("publish", "model", finished_run, "--repo", "org/tiny", imported={"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 1
    assert "offline mode is on; unset HF_HUB_OFFLINE to publish" in offline.stderr


def test_no_token(hub, spark_vl, finished_run):
    done = spark_vl("publish", "model", finished_run, "--repo", "org/tiny", HF_TOKEN="")
    assert done.returncode == 1
    assert "no token was found: log in with `hf auth login`, set HF_TOKEN, or give --token-from" in done.stderr
