"""A body of POST /v1/chat/completions -> what is asked for, or why it is refused. Pure.

The shapes are those of OpenAI's API reference, "Create chat completion". What would change the text and is not done
here is refused; what would not is ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from kinflow.ready import ready
from kinflow.text.summary import Mode

# Parameters that do not change the text.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Parameters whose only value here is the one that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
MAX_STOPS = 4
SMALLEST_TOP_P = 1e-9


class Refused(Exception):
    """A request that gets an error instead of an answer, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """One completion to make."""

    model: str
    messages: list[dict[str, str]]
    temperature: float
    top_p: float
    seed: int | None
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    mode: Mode | None


class _Part(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Kinflow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Mode | None = None


@ready
class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    seed: int | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    kinflow: _Kinflow = _Kinflow()
    """This server's own: {"mode": "exact"}, for one."""


def parse(body: bytes) -> Asked:
    """Raises Refused."""
    asked = _read(body)
    _refuse_unknown(asked)
    try:
        request = msgspec.convert({key: asked[key] for key in asked if key in _Request.__struct_fields__}, _Request)
    except msgspec.ValidationError as exc:
        place = re.search(r" - at `\$\.(\w+)", str(exc))
        raise Refused(400, str(exc), param=place[1] if place else None) from exc
    return Asked(
        request.model,
        [_plain(message) for message in request.messages],
        request.temperature,
        max(request.top_p, SMALLEST_TOP_P),
        # Seeds there are any integers.
        None if request.seed is None else request.seed % (1 << 63),
        request.max_completion_tokens or request.max_tokens,
        _stops(request.stop),
        request.stream,
        request.stream_options.include_usage,
        request.kinflow.mode,
    )


def _read(body: bytes) -> dict[str, Any]:
    """Without the keys that are null: they are as good as absent."""
    try:
        asked = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Refused(400, f"the body is not valid JSON: {exc}") from exc
    if not isinstance(asked, dict):
        raise Refused(400, "the body must be a JSON object")
    return {key: value for key, value in asked.items() if value is not None}


def _refuse_unknown(asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise Refused(
                    400, f"{name} = {value!r:.80} is not supported here", code="unsupported_value", param=name
                )
        elif name not in IGNORED and name not in _Request.__struct_fields__:
            raise Refused(400, f"unknown parameter: {name:.80}", code="unknown_parameter", param=name[:80])


def _plain(message: _Message) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": text}


def _stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS or not all(stops):
        raise Refused(400, f"stop: at most {MAX_STOPS} sequences, none of them empty", param="stop")
    return stops
