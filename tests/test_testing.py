"""The public fakes: the same surface as the real device, and answers that could be real ones."""

from __future__ import annotations

import asyncio
import inspect
from itertools import repeat
from typing import Any

import msgspec
import numpy as np
import pytest

import kinflow
from kinflow import testing
from kinflow.errors import InputError, SettingsError
from kinflow.family import Family
from kinflow.testing import FakeDevice, InferenceDevice, answer

METHODS = [name for name in vars(InferenceDevice) if inspect.isfunction(getattr(InferenceDevice, name))]
SURFACE = ["__enter__", "__exit__", "collect", "infer", "submit", "wait_for_server"]


def parameters(kind: type, method: str) -> list[tuple[str, Any, Any, Any]]:
    signature = inspect.signature(getattr(kind, method))
    return [(each.name, each.kind, each.default, each.annotation) for each in signature.parameters.values()]


@pytest.mark.parametrize("method", SURFACE)
def test_the_signatures_are_the_real_devices(method: str) -> None:
    """What a test calls on the fake can be called on the real one, by the same names with the same defaults."""
    assert parameters(FakeDevice, method) == parameters(kinflow.Device, method)
    assert parameters(InferenceDevice, method) == parameters(kinflow.Device, method)
    if method != "__enter__":
        fake, real = (inspect.signature(getattr(kind, method)) for kind in (FakeDevice, kinflow.Device))
        assert fake.return_annotation == real.return_annotation


def test_the_protocol_covers_all_public_methods() -> None:
    """A new method of Device must come to the fake as well; `open` makes a device and belongs to the class."""
    public = {name for name, value in vars(kinflow.Device).items() if inspect.isfunction(value)}
    public = {name for name in public if not name.startswith("_")} | {"__enter__", "__exit__"}
    assert public == set(SURFACE)
    assert set(SURFACE) <= set(METHODS)
    assert testing.__all__ == sorted(testing.__all__)


def ask(device: InferenceDevice, image: Any) -> str:
    """An app's function: takes either."""
    with device:
        return device.infer(image, deadline_s=0.5).tier


def test_an_app_can_be_given_either(family: Family) -> None:
    """The same function runs on the real device and on the fake."""
    image = np.zeros((8, 8), np.uint8)
    assert ask(kinflow.Device(family, kinflow.DeviceSettings(offload=False)), image) == "device"
    assert ask(FakeDevice([answer(tier="edge")]), image) == "edge"


def test_answers_come_in_turn_and_images_are_kept() -> None:
    """In order, each with its image and deadline on record."""
    with FakeDevice([answer("cat"), answer("dog", "edge")]) as device:
        assert device.infer("one").label == "cat"
        assert device.submit("two", deadline_s=0.1).result(0).label == "dog"
    assert device.images == ["one", "two"]
    assert device.deadlines_s == [None, 0.1]


def test_an_exception_among_the_answers_is_raised() -> None:
    """By infer at once, by submit from its future, and the next answer is the next."""
    with FakeDevice([InputError("bad"), InputError("worse"), answer("cat")]) as device:
        with pytest.raises(InputError, match="bad"):
            device.infer(None)
        future = device.submit(None)
        with pytest.raises(InputError, match="worse"):
            future.result(0)
        assert device.infer(None).label == "cat"


def test_asking_too_often_fails_the_test() -> None:
    """With AssertionError, which no app catches; an endless iterable never runs out."""
    device = FakeDevice([answer()])
    device.infer(0)
    with pytest.raises(AssertionError, match="asked 2 times, it has 1 answers"):
        device.infer(0)
    endless = FakeDevice(repeat(answer()))
    assert all(endless.infer(0).label == "label" for _ in range(100))


def test_mistakes_are_refused_as_by_the_real_device(family: Family) -> None:
    """The same error for a deadline that is none and for submit outside of a with block."""
    real = kinflow.Device(family, kinflow.DeviceSettings(offload=False))
    image = np.zeros((8, 8), np.uint8)
    fake = FakeDevice(repeat(answer()))
    device: InferenceDevice
    for device in (real, fake):
        for deadline_s in (0.0, -1.0, float("nan"), float("inf"), 1e9):
            with pytest.raises(SettingsError, match="deadline_s must be above 0"):
                device.infer(image, deadline_s=deadline_s)
        with pytest.raises(SettingsError, match="use it in a with block"):
            device.submit(image)
    assert fake.images == []


def test_the_server_is_there_or_not_at_once() -> None:
    """As the test says, whatever the timeout."""
    assert FakeDevice([]).wait_for_server(60)
    assert not FakeDevice([], server=False).wait_for_server(60)


def test_a_future_can_be_awaited() -> None:
    """asyncio.wrap_future works on the fake's futures too."""

    async def run() -> str:
        with FakeDevice([answer("cat", "cloud")]) as device:
            return (await asyncio.wrap_future(device.submit(0))).label

    assert asyncio.run(run()) == "cat"


@pytest.mark.parametrize("tier", ["device", "edge", "cloud"])
@pytest.mark.parametrize("degraded", [False, True])
def test_made_answers_are_plausible(tier: Any, degraded: bool) -> None:
    """Only what left the device cost bytes, and what is degraded says why."""
    made = answer("cat", tier, degraded=degraded)
    assert (made.label, made.tier, made.exit, made.degraded) == ("cat", tier, tier, degraded)
    assert (made.bytes_up > 0) == (made.bytes_down > 0) == (made.timings.link_ms > 0) == (tier != "device")
    assert 0 <= made.confidence <= 1
    assert made.reason or not degraded
    timings = made.timings
    assert timings.compute_ms + timings.encode_ms + timings.link_ms <= made.total_ms
    assert len(bytes.fromhex(made.request_id)) == 16


def test_every_field_can_be_overridden() -> None:
    """And a field that does not exist is a TypeError, not a silent nothing."""
    plain = answer()
    for field in msgspec.structs.fields(kinflow.Answer):
        made = answer(**{field.name: getattr(plain, field.name)})
        assert getattr(made, field.name) == getattr(plain, field.name)
    assert answer(confidence=0.1, bytes_up=3) == msgspec.structs.replace(plain, confidence=0.1, bytes_up=3)
    with pytest.raises(TypeError, match="confidense"):
        answer(confidense=1)


def test_the_fake_hands_out_what_came_eventually() -> None:
    """`collect` gives what the test said, each once; `submit` takes `when` and answers at once."""
    late = answer("parcel", tier="edge")
    with FakeDevice([answer("letter")], collected=[late]) as device:
        assert device.submit(np.zeros(1), when="eventually").result(0).label == "letter"
        assert list(device.collect()) == [late]
        assert list(device.collect()) == []
