"""`kinflow chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinflow.cli import flags, texts
from kinflow.errors import InputError

if TYPE_CHECKING:
    from kinflow.text.device import TextDevice
    from kinflow.text.summary import Mode

HELP = """\
/mode MODE  whose text it is from now on: family, exact, confident or local
/reset      forget the conversation
/help       these lines
/quit       end, as Ctrl-D does
Ctrl-C stops a reply, not the conversation."""
# Of the model's positions, what is kept free for a reply: the oldest turns are forgotten for it.
REPLY_SHARE = 0.25


def chat(
    system: Annotated[
        str, typer.Option(help="What the system says first; the template's own without.", show_default=False)
    ] = "",
    bundle: flags.Bundle = None,
    family: texts.FamilyName = None,
    mode: texts.ModeName = None,
    max_tokens: texts.MaxTokens = None,
    temperature: texts.Temperature = 0.0,
    top_p: texts.TopP = 1.0,
    seed: texts.Seed = None,
    broker: flags.Broker = None,
    interface: flags.Interface = None,
    tls: flags.Tls = None,
    insecure_lan: flags.InsecureLan = None,
    wait: texts.Wait = flags.SERVER_WAIT_S,
    settings_file: flags.SettingsFile = None,
) -> None:
    """Talk with the model; its tokens are coloured by who said them.

    After each reply a line tells what it cost. /help lists the commands.
    """
    chosen = texts.load_settings(
        settings_file,
        mode,
        broker,
        interface,
        tls,
        insecure_lan,
        text__max_tokens=max_tokens,
    )
    with texts.opened(bundle, family, chosen, wait) as device:
        Chat(device, system, chosen.text.mode, temperature=temperature, top_p=top_p, seed=seed).run()


class Chat:
    """What was said so far, and how it goes on."""

    def __init__(self, device: TextDevice, system: str, mode: Mode, **sampling: Any) -> None:
        from kinflow.cli.colours import console

        self._device = device
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._mode = mode
        self._sampling = sampling
        self._console = console()

    def run(self) -> None:
        """Until /quit or the end of standard input."""
        from kinflow.cli.colours import legend

        manifest = self._device.family.manifest
        self._console.print(f"{manifest.id} {manifest.version}, mode {self._mode}; /help lists the commands")
        self._console.print(legend())
        typed = sys.stdin.isatty()
        if typed:
            with suppress(ImportError):
                import readline  # noqa: F401  gives input() the arrow keys
        while True:
            try:
                line = _line("> " if typed else "")
                if line == "/quit":
                    return
                self._hear(line)
            except KeyboardInterrupt:
                if not typed:
                    raise
                print("\n/quit ends the conversation")

    def _hear(self, line: str) -> None:
        if line.startswith("/"):
            self._command(*line.split())
        elif line:
            self._reply(line)

    def _command(self, name: str, *words: str) -> None:
        from kinflow.text.device import MODES

        chosen = next((mode for mode in MODES if words == (mode,)), None)
        if name == "/reset" and not words:
            self._turns = []
            self._console.print("forgotten")
        elif name == "/mode" and chosen:
            self._mode = chosen
            self._console.print(f"mode {chosen}")
        else:
            self._console.print(HELP)

    def _reply(self, said: str) -> None:
        from kinflow.cli.colours import piece, statistics

        self._turns.append({"role": "user", "content": said})
        try:
            self._make_room()
            generation = self._device.generate(self._messages, mode=self._mode, **self._sampling)
        except InputError as exc:
            self._turns.pop()
            self._console.print(f"error: {exc}", style="red", markup=False)
            return
        reply = ""
        try:
            with texts.stoppable() as stopped, closing(iter(generation)) as tokens:
                for token in tokens:
                    self._console.print(piece(token), end="")
                    reply += token.text
                    if stopped():
                        break
        finally:
            self._turns.append({"role": "assistant", "content": reply})
        self._console.print()
        self._console.print(statistics(generation.summary))

    @property
    def _messages(self) -> list[dict[str, str]]:
        return [*self._system, *self._turns]

    def _make_room(self) -> None:
        """The oldest question and its reply go, until the rest leaves room for a reply."""
        context = self._device.family.manifest.context
        forgotten = 0
        while len(self._turns) > 1 and len(self._device.tokenizer.chat(self._messages)) > context * (1 - REPLY_SHARE):
            del self._turns[:2]
            forgotten += 1
        if forgotten:
            self._console.print(f"(forgotten: {forgotten} of the oldest replies; the model takes {context} tokens)")


def _line(prompt: str) -> str:
    """What the user says, without the spaces around; /quit at the end of standard input. Raises InputError."""
    try:
        return input(prompt).strip()
    except EOFError:
        return "/quit"
    except UnicodeDecodeError as exc:
        raise InputError(f"standard input is not UTF-8: {exc}") from exc
