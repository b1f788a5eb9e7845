"""`kinflow serve` as apps use it: a real process, a real server behind it, and OpenAI's own client."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from brokers import wait_until
from kinflow.fleet import LOOPBACK, Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from system_fixtures import Running, running

HELLO: Any = [{"role": "user", "content": "Is it late?"}]
# The tiny model's texts hardly ever end by themselves.
LONG = 470
# Sessions at a server that nobody asks: that of its own test.
IDLE = 1


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    """It has all layers."""
    with Fleet([tiny]) as fleet:
        yield fleet.start("edge", "--member", "cloud", "--no-advertise")


@contextmanager
def serving(tiny: Path, *options: str) -> Iterator[tuple[Running, str]]:
    """The process and its URL."""
    with running("serve", str(tiny), "--port", "0", "--json", *options) as run:
        yield run, str(run.ready()["url"])


def client(url: str, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, **options)


@pytest.fixture(scope="module")
def url(tiny: Path, server: ServerProcess) -> Iterator[str]:
    """Of an endpoint behind which the server verifies; two texts at a time."""
    options = ("--broker", server.broker, "--parallel", "2", "--model", "gpt-4o-mini")
    with serving(tiny, *options) as (_, url):
        yield url


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with client(url) as ai:
        yield ai


@pytest.fixture(scope="module")
def device(tiny: Path, server: ServerProcess) -> Iterator[TextDevice]:
    """What an app without the endpoint would use."""
    with TextDevice.open(tiny, DeviceSettings(broker=server.broker)) as device:
        assert device.wait_for_server(20)
        yield device


def sessions(server: ServerProcess) -> int:
    """How many generations the server holds."""
    said = urllib.request.urlopen(f"http://{server.ready['http']}/metrics").read().decode()
    found = re.search(r"^kinflow_sessions (\d+)\.0$", said, re.MULTILINE)
    assert found
    return int(found[1])


def test_models(ai: openai.OpenAI) -> None:
    """The family's own name and those it is given; another one is not found."""
    assert [model.id for model in ai.models.list()] == ["tiny", "gpt-4o-mini"]
    assert ai.models.retrieve("tiny").owned_by == "kinflow"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-5")


def test_a_whole_completion_is_the_devices_text(ai: openai.OpenAI, device: TextDevice) -> None:
    """Text, reason to end and usage; beside them who said how much, and how it was made."""
    expected = device.generate(HELLO, max_tokens=40)
    text = "".join(token.text for token in expected)
    made = ai.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=40, temperature=0)
    (choice,) = made.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert made.model == "tiny"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (expected.summary.prompt_tokens, 40)
    about: dict[str, Any] = made.kinflow  # type: ignore[attr-defined]
    assert sum(about["tokens"].values()) == 40
    assert about["tokens"]["edge"] > 0
    assert (about["mode"], about["degraded"], about["reason"]) == ("family", False, "")
    assert about["bytes_up"] > 0


def test_a_stream_is_the_same_text(ai: openai.OpenAI) -> None:
    """Sampled with one seed: first the role, then pieces, why it ended with what it cost, and the usage."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 40, "seed": 5, "top_p": 0.9}
    whole = ai.chat.completions.create(**asked)
    chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 10
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2].kinflow["seed"] == whole.kinflow["seed"] == 5  # type: ignore[attr-defined]
    assert sum(chunks[-2].kinflow["tokens"].values()) == 40  # type: ignore[attr-defined]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_texts_at_the_same_time_do_not_mix(ai: openai.OpenAI) -> None:
    """Two questions at once get what each gets alone."""

    def ask(question: str) -> str | None:
        messages: Any = [{"role": "user", "content": question}]
        made = ai.chat.completions.create(model="tiny", messages=messages, max_tokens=80, temperature=0)
        return made.choices[0].message.content

    questions = ["Is it late?", "Name a bird."]
    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, questions)) == alone
    assert alone[0] != alone[1]


def test_a_mode_may_be_asked_for(ai: openai.OpenAI) -> None:
    """Per request: the device alone, which is not degraded when it is wanted."""
    made = ai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, extra_body={"kinflow": {"mode": "local"}}
    )
    about: dict[str, Any] = made.kinflow  # type: ignore[attr-defined]
    assert about["tokens"] == {"device": 5, "edge": 0, "cloud": 0}
    assert (about["mode"], about["degraded"]) == ("local", False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_text_before_it(ai: openai.OpenAI, server: ServerProcess, stream: bool) -> None:
    """Also one that two tokens make together; the session at the server ends with it."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0}
    text = ai.chat.completions.create(**asked).choices[0].message.content or ""
    stop = text[20:23]
    if stream:
        chunks = list(ai.chat.completions.create(**asked, stop=["never", stop], stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = ai.chat.completions.create(**asked, stop=["never", stop]).choices[0]
        said, finish = choice.message.content or "", choice.finish_reason
    assert said == text[: text.index(stop)]
    assert finish == "stop"
    wait_until(lambda: sessions(server) == IDLE)


def test_errors_are_openais_own(ai: openai.OpenAI) -> None:
    """The client raises the classes that apps know, with code and parameter."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO}
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(**{**asked, "model": "gpt-5"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        ai.chat.completions.create(**asked, n=3)
    assert (wrong.value.code, wrong.value.param, wrong.value.type) == (
        "unsupported_value",
        "n",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as long:
        ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 600}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="top_k"):
        ai.chat.completions.create(**asked, extra_body={"top_k": 5})


def begun(ai: openai.OpenAI) -> Any:
    """A long stream that has said something."""
    stream = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=LONG, stream=True)
    next(iter(stream))
    return stream


def test_too_many_at_once_are_told_to_come_back(ai: openai.OpenAI, server: ServerProcess) -> None:
    """Two are served at the same time, the third gets 429; whoever leaves makes room, and frees the session."""
    streams = [begun(ai), begun(ai)]
    with pytest.raises(openai.RateLimitError) as busy:
        ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert busy.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()

    def there_is_room() -> bool:
        try:
            return bool(ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices)
        except openai.RateLimitError:
            return False

    start_s = time.monotonic()
    wait_until(there_is_room)
    # A whole text of that length takes longer than a token.
    assert time.monotonic() - start_s < 10
    wait_until(lambda: sessions(server) == IDLE)


def test_a_client_that_leaves_ends_its_text(tiny: Path, server: ServerProcess) -> None:
    """One that waits for a whole completion and hangs up: the rest is not computed, the session is freed."""
    words = ("serve", str(tiny), "--port", "0", "--json", "--broker", server.broker)
    with running("--log-level", "info", *words) as run:
        url = str(run.ready()["url"])
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        # The sessions of texts before this one end when the server has heard of it.
        wait_until(lambda: sessions(server) == IDLE)
        asked = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": LONG})
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n{asked}".encode())
            wait_until(lambda: sessions(server) > IDLE)
        assert int(run.line(r"text generated .*tokens=(\d+)")[1]) < LONG
        wait_until(lambda: sessions(server) == IDLE)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(20) == 0
        assert "Traceback" not in "\n".join(run.err)


def test_without_a_server_the_text_is_degraded_and_says_so(tiny: Path) -> None:
    """A broker at which nobody serves: 200, the device's own text, and the reason."""
    with socket.create_server((LOOPBACK, 0)) as nobody:
        broker = f"{LOOPBACK}:{nobody.getsockname()[1]}"
        with serving(tiny, "--broker", broker, "--wait", "0") as (_, url), client(url) as ai:
            made = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    about: dict[str, Any] = made.kinflow  # type: ignore[attr-defined]
    assert about["tokens"]["device"] == 5
    assert about["unverified"] == 5
    assert about["degraded"]
    assert about["reason"]


def test_an_endpoint_that_stops_tells_who_is_being_served(tiny: Path) -> None:
    """SIGTERM in mid-text: the stream ends with an error, not as if it were whole; the process ends with 0."""
    with serving(tiny, "--mode", "local") as (run, url), client(url) as ai:
        stream = begun(ai)
        run.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)
        assert run.wait(20) == 0
        assert run.gone()
