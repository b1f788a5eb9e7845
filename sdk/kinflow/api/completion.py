"""One completion: pieces of text out of a Generation, and the objects of OpenAI's API around them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import msgspec

from kinflow.api.request import Asked, Refused
from kinflow.api.stops import Stops
from kinflow.errors import InputError
from kinflow.text.device import TextDevice


class Completion:
    """Iterate over `pieces` once; the rest is complete afterwards."""

    def __init__(self, device: TextDevice, asked: Asked) -> None:
        """Starts nothing. Raises Refused."""
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        manifest = device.family.manifest
        self._model, self._version = manifest.id, manifest.version
        self._stops = Stops(asked.stops)
        self._finish = ""
        self._seed = secrets.randbits(62) if asked.seed is None else asked.seed
        try:
            prompt = device.tokenizer.chat(asked.messages)
            if len(prompt) >= manifest.context:
                raise Refused(
                    400,
                    f"{manifest.id} takes {manifest.context} tokens with those of the reply, the messages have "
                    f"{len(prompt)}: shorten them",
                    code="context_length_exceeded",
                    param="messages",
                )
            self._generation = device.continue_from(
                prompt,
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=self._seed,
                mode=asked.mode,
            )
        except InputError as exc:
            raise Refused(400, str(exc)) from exc

    def pieces(self, check: Callable[[], None]) -> Generator[str, None, None]:
        """The text. `check` is called after each token; what it raises ends the text."""
        with closing(iter(self._generation)) as tokens:
            for token in tokens:
                if text := self._stops.push(token.text):
                    yield text
                if self._stops.found:
                    self._finish = "stop"
                    return
                check()
        if text := self._stops.rest():
            yield text
        self._finish = self._generation.summary.finish

    @property
    def usage(self) -> dict[str, int]:
        summary = self._generation.summary
        return {
            "prompt_tokens": summary.prompt_tokens,
            "completion_tokens": summary.count,
            "total_tokens": summary.prompt_tokens + summary.count,
        }

    @property
    def kinflow(self) -> dict[str, Any]:
        """What OpenAI's API has no place for: who said how much, at which cost, and whether it is as promised."""
        about: dict[str, Any] = msgspec.to_builtins(self._generation.summary)
        del about["finish"], about["prompt_tokens"]
        return {**about, "seed": self._seed, "version": self._version}

    def whole(self, text: str) -> dict[str, Any]:
        """The object `chat.completion`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": self._finish,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self.usage,
            "kinflow": self.kinflow,
        }

    def chunk(self, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        """One object `chat.completion.chunk` of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def last_chunk(self) -> dict[str, Any]:
        """Why it ended, and what it cost."""
        last = self.chunk({}, kinflow=self.kinflow)
        last["choices"][0]["finish_reason"] = self._finish
        return last

    def usage_chunk(self) -> dict[str, Any]:
        """After the last one, where it was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}
