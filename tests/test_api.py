"""The endpoint's pure parts: what a request asks for, and where a stop sequence ends a text."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinflow.api.request import IGNORED, NEUTRAL, Refused, parse
from kinflow.api.stops import Stops

LEAST = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def body(**changes: Any) -> bytes:
    return json.dumps({**LEAST, **changes}).encode()


def refused(raw: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(raw)
    return caught.value


def test_defaults_are_openais() -> None:
    """Temperature 1, all of the distribution, no seed, no limit of its own, one whole answer."""
    asked = parse(body())
    assert (asked.temperature, asked.top_p, asked.seed, asked.max_tokens) == (1.0, 1.0, None, None)
    assert (asked.stops, asked.stream, asked.include_usage, asked.mode) == ((), False, False, None)


def test_everything_that_is_understood() -> None:
    """Each parameter arrives; a developer's message is the system's, parts of a content are joined."""
    asked = parse(
        body(
            messages=[
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "name": "x",
                },
            ],
            temperature=0,
            top_p=0,
            seed=-1,
            max_tokens=7,
            max_completion_tokens=9,
            stop="\n",
            stream=True,
            stream_options={"include_usage": True},
            kinflow={"mode": "exact"},
        )
    )
    assert asked.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    assert (asked.temperature, asked.max_tokens, asked.stops) == (0, 9, ("\n",))
    assert 0 < asked.top_p < 1e-6
    assert asked.seed == 2**63 - 1
    assert (asked.stream, asked.include_usage, asked.mode) == (True, True, "exact")


def test_what_changes_nothing_is_ignored() -> None:
    """Nulls, parameters that say nothing of the text, and the neutral value of those that would."""
    nulls = dict.fromkeys([*NEUTRAL, "temperature", "stop", "seed"])
    asked = parse(body(**{**nulls, **dict.fromkeys(IGNORED, "anything")}))
    for name, values in NEUTRAL.items():
        for value in values:
            assert parse(body(**{name: value})) == asked


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"top_k": 4}, "top_k"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"model": None}, None),
        ({"kinflow": {"mode": "best"}}, "kinflow"),
        ({"kinflow": {"tier": "cloud"}}, "kinflow"),
    ],
)
def test_what_would_change_the_text_is_refused(changes: dict[str, Any], param: str | None) -> None:
    """With status 400 and the parameter's name, in OpenAI's shape."""
    why = refused(body(**changes))
    assert why.status == 400
    assert why.body["error"]["type"] == "invalid_request_error"
    assert why.body["error"]["param"] == param
    assert why.body["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"model": 1}', b"[" * 100_000])
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    """Not JSON, not an object, too deep: 400, never another error."""
    assert refused(raw).status == 400


@given(st.binary(max_size=200) | st.dictionaries(st.sampled_from([*LEAST, "n", "stop"]), st.integers()).map(json.dumps))
def test_any_body_is_parsed_or_refused(raw: bytes | str) -> None:
    """Nothing but Refused is raised."""
    with suppress(Refused):
        assert parse(raw.encode() if isinstance(raw, str) else raw).messages


def pieces(stops: Stops, text: list[str]) -> str:
    said = ""
    for piece in text:
        said += stops.push(piece)
        if stops.found:
            return said
    return said + stops.rest()


@given(st.lists(st.text("ab.", max_size=4)), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_its_first_stop_sequence(text: list[str], sequences: list[str]) -> None:
    """However it is cut into pieces; without one it is whole."""
    whole = "".join(text)
    ends = [whole.find(sequence) for sequence in sequences if sequence in whole]
    stops = Stops(sequences)
    said = pieces(stops, text)
    assert stops.found == bool(ends)
    # A later piece may hold a sequence that begins earlier than one already found, never one that ends earlier.
    if not ends:
        assert said == whole
    else:
        assert whole.startswith(said)
        assert not any(sequence in said for sequence in sequences)


def test_only_what_may_begin_a_stop_sequence_is_held_back() -> None:
    """The rest is shown at once."""
    stops = Stops(["END", "."])
    assert stops.push("a E") == "a "
    assert stops.push("N") == ""
    assert stops.push("x E") == "ENx "
    assert stops.push("ND of it") == ""
    assert stops.found
    assert Stops([]).push("anything") == "anything"
