"""`bench offload`: what broker, client, framing and threads add to a bare TCP relay of the same bytes."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kinflow.device import Device
from kinflow.errors import LinkError
from kinflow.fleet import Fleet
from kinflow.settings import DeviceSettings
from kinflow_bench import synthetic
from kinflow_bench.echo import Echo
from kinflow_bench.timing import spread

# Features of about 1, 16 and 64 kB: side × side values of one byte.
SIDES = {1: 32, 16: 128, 64: 256}
WARM_UP = 30


def run(rounds: int, broker_kind: str) -> dict[str, Any]:
    """For each size in kB: median offload less encode, decode and compute, over the median echo."""
    sizes = {}
    for kilobytes, side in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            sizes[str(kilobytes)] = _measure(
                synthetic.write(Path(folder), synthetic.Shape(side, coded=False)), side, rounds, broker_kind
            )
    return {
        "ratio": {size: figures["ratio"] for size, figures in sizes.items()},
        "ratio_reply_sized": {size: figures["ratio_reply_sized"] for size, figures in sizes.items()},
        "sizes": sizes,
    }


def _measure(bundle: Path, side: int, rounds: int, broker_kind: str) -> dict[str, Any]:
    image = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    with Fleet([bundle]) as fleet, Echo() as echo:
        server = fleet.start("cloud", "--no-advertise", "--broker-kind", broker_kind)
        with Device.open(bundle, DeviceSettings(broker=server.broker, deadline_s=5.0)) as device:
            if not device.wait_for_server(10.0):
                raise LinkError(f"no server at {server.broker}")
            figures: dict[str, list[float]] = {"offload": [], "total": [], "echo": [], "echo_reply_sized": []}
            for round_ in range(WARM_UP + rounds):
                answer = device.infer(image)
                if answer.tier != "cloud":
                    raise LinkError(f"an inference stayed on the device: {answer.reason}")
                echo_ms = echo.round_trip_ms(answer.bytes_up, answer.bytes_up)
                reply_sized_ms = echo.round_trip_ms(answer.bytes_up, answer.bytes_down)
                if round_ >= WARM_UP:
                    timings, hop = answer.timings, answer.timings.hops[0]
                    own_ms = timings.compute_ms + timings.encode_ms + hop.decode_ms + hop.compute_ms
                    figures["offload"].append(answer.total_ms - own_ms)
                    figures["total"].append(answer.total_ms)
                    figures["echo"].append(echo_ms)
                    figures["echo_reply_sized"].append(reply_sized_ms)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "ratio": medians["offload"] / medians["echo"],
        "ratio_reply_sized": medians["offload"] / medians["echo_reply_sized"],
        "broker": server.ready["broker_kind"],
        "bytes_up": answer.bytes_up,
        "bytes_down": answer.bytes_down,
        "offload_ms": spread(figures["offload"]),
        "offload_with_own_work_ms": spread(figures["total"]),
        "echo_ms": spread(figures["echo"]),
        "echo_reply_sized_ms": spread(figures["echo_reply_sized"]),
    }
