"""Text <-> token ids, and the chat template. The `tokenizers` library does the first, jinja2 the second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from kinflow.errors import BundleError, InputError

EXTRA = "the tokenizer is not installed: pip install 'kinflow[text]'"


class Tokenizer:
    def __init__(self, tokenizer: bytes, chat_template: bytes, stop_tokens: Sequence[int]) -> None:
        """`tokenizer`: a tokenizer.json. Raises BundleError."""
        if find_spec("tokenizers") is None or find_spec("jinja2") is None:
            raise BundleError(EXTRA)
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer as Library

        try:
            self.inner = Library.from_str(tokenizer.decode())
            # Sandboxed: a bundle's template is a stranger's program.
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            self._template = environment.from_string(chat_template.decode())
        except (TemplateError, UnicodeDecodeError) as exc:
            raise BundleError(f"the chat template does not compile: {exc}") from exc
        except Exception as exc:  # the library raises plain Exception
            raise BundleError(f"tokenizer.json does not load: {exc}") from exc
        self.stop_tokens = frozenset(stop_tokens)

    def encode(self, text: str) -> list[int]:
        """Raises InputError."""
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InputError(f"the text cannot be written as UTF-8: {exc}") from exc
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.inner.decode(list(tokens), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation that the model is to continue. Raises InputError for a malformed one."""
        if not messages:
            raise InputError("messages: at least one is needed")
        for number, message in enumerate(messages):
            fields = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None,)
            if not all(isinstance(field, str) for field in fields):
                shown = json.dumps(message, default=str)[:80]
                raise InputError(f"messages[{number}]: role and content must be strings, got {shown}")
        from jinja2 import TemplateError

        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True)
        except TemplateError as exc:
            raise InputError(f"messages: the chat template refuses them: {exc}") from exc
        return self.encode(text)


class Stream:
    """Token ids -> pieces of text as they become whole: no piece ends in half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._inner = tokenizer.inner
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """What can be shown now; empty while a character is not whole."""
        return self._stream.step(self._inner, token) or ""
