"""What the commands for language models have in common: their flags, the device they open, how Ctrl-C ends a text."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinflow import settings
from kinflow.cli.bundles import choose_text_bundle
from kinflow.text.summary import Mode

if TYPE_CHECKING:
    from kinflow.text.device import TextDevice

FamilyName = Annotated[
    str | None, typer.Option(help="Look for the bundle in families/NAME/bundle (smollm2).", show_default=False)
]
ModeName = Annotated[Mode | None, typer.Option(help="Whose text it is (family).", show_default=False)]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest text, tokens.", show_default=False)]
Temperature = Annotated[float, typer.Option(min=0, max=100, help="0: the likeliest token each time.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Only the likeliest tokens that have this share together.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same one gives the same text.", show_default=False)]
Wait = Annotated[float, typer.Option(help="Seconds to wait for a server first.")]


def load_settings(
    file: Path | None,
    mode: Mode | None,
    broker: str | None,
    interface: list[str] | None,
    tls: str | None,
    insecure_lan: bool | None,
    **flags: Any,
) -> settings.DeviceSettings:
    """The device's, with the flags that were given. Raises SettingsError."""
    return settings.load(
        "device",
        settings.DeviceSettings,
        file,
        text__mode=mode,
        broker=broker,
        interfaces=interface or None,
        tls__folder=tls,
        tls__insecure_lan=insecure_lan,
        **flags,
    )


@contextmanager
def opened(
    bundle: Path | None, family: str | None, chosen: settings.DeviceSettings, wait_s: float
) -> Iterator[TextDevice]:
    """The device, with a server found or a line that says there is none. Raises KinflowError."""
    from kinflow.text.device import TextDevice

    device = TextDevice.open(choose_text_bundle(bundle, family), chosen)
    with device:
        asks = chosen.offload and chosen.text.mode != "local"
        if asks and wait_s > 0 and not device.wait_for_server(wait_s):
            typer.echo(f"no server found within {wait_s:g} s: the device writes by itself for now", err=True)
        yield device


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the text is left between two tokens. A second one interrupts at once."""
    pressed = False

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
