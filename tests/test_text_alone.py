"""A text whose last server is gone goes on as the device alone would have: by its whole head."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from kinflow.fleet import Fleet
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.head import HeadRunner, Likely
from kinflow.text.segment import Array
from kinflow_builder.text.tiny import write_tiny

LENGTH, SERVED = 40, 12


def test_no_draft_of_a_shortlist_is_said_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all drafts are wrong and sure of it, none of them is in the text, with a server or without."""
    write_tiny(tmp_path / "bundle", seed=0)

    def wrong(self: HeadRunner, hidden: Array) -> Likely:
        token = (int(self.run(hidden)[0].argmax()) + 1) % 200 + 3
        return Likely(np.array([token]), np.array([9.0], np.float32))

    monkeypatch.setattr(HeadRunner, "likely", wrong)
    with Fleet([tmp_path / "bundle"]) as fleet:
        server = fleet.start("edge", "--member", "cloud", "--no-advertise")
        with TextDevice.open(tmp_path / "bundle", DeviceSettings(broker=server.broker)) as device:
            assert device.wait_for_server(20)
            asked = device.tokenizer.chat([{"role": "user", "content": "Is it late?"}])
            generation = device.continue_from(asked, max_tokens=LENGTH, mode="family")
            tokens = []
            for token in generation:
                tokens.append(token)
                if len(tokens) == SERVED:
                    os.kill(server.pid, signal.SIGKILL)
            verified = sum(token.verified for token in tokens)
            assert SERVED <= verified < LENGTH
            said = [token.id for token in tokens]
            alone = device.continue_from(asked + said[:verified], max_tokens=LENGTH - verified, mode="local")
            # A prompt is computed at once, a text one by one: far on, a choice may hang by the last digit.
            assert [token.id for token in alone][:4] == said[verified : verified + 4]
            assert generation.summary.degraded
