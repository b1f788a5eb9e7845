"""One line of NVIDIA's `tegrastats`, as its pages for JetPack 4 to 6 describe it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from kinflow.board.state import BoardState
from kinflow.errors import InputError

# Processors' sensors; others are of the power chip, of memory, or a mean. And the rail of the whole module.
_PROCESSORS = ("cpu", "gpu", "soc", "tj")
_WHOLE = ("VDD_IN", "POM_5V_IN")


@dataclass(frozen=True)
class Tegrastats:
    ram_used_mb: int
    ram_total_mb: int
    cpu_loads: tuple[float, ...]
    """Share of each core that is on, 0 to 1."""
    gpu_load: float | None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    """By sensor: CPU, GPU, tj, … as the board names them."""
    power_mw: dict[str, int] = field(default_factory=dict)
    """By rail, now: VDD_IN is the whole module."""


def parse(line: str) -> Tegrastats:
    """Raises InputError for a line without RAM and CPU. Sensors that a board lacks are just not there."""
    ram = re.search(r"RAM (\d+)/(\d+)MB", line)
    cpu = re.search(r"CPU \[([^\]]*)\]", line)
    if ram is None or cpu is None:
        raise InputError(f"no line of tegrastats: {line.strip()[:60]!r}")
    gpu = re.search(r"GR3D_FREQ (\d+)%", line)
    return Tegrastats(
        ram_used_mb=int(ram[1]),
        ram_total_mb=int(ram[2]),
        cpu_loads=tuple(int(share) / 100 for share in re.findall(r"(\d+)%", cpu[1])),
        gpu_load=None if gpu is None else int(gpu[1]) / 100,
        # A sensor that is switched off says -256C.
        temperatures_c={
            name: float(value) for name, value in re.findall(r"(\w+)@(-?[\d.]+)C", line) if float(value) > -200
        },
        # "VDD_IN 4940mW/4940mW"; JetPack 4 wrote "POM_5V_IN 2532/2532". RAM and SWAP have an "MB" behind them.
        power_mw={
            name: int(value) for name, value in re.findall(r"(V\w+|POM_\w+) (\d+)(?:mW)?/\d+(?:mW)?(?= |$)", line)
        },
    )


def completed(state: BoardState, said: Tegrastats) -> BoardState:
    """`state` with what its kernel's files do not tell: heat of the processors, GPU load, power of the module."""
    heat = [value for name, value in said.temperatures_c.items() if name.lower().startswith(_PROCESSORS)]
    power = [said.power_mw[rail] / 1000 for rail in _WHOLE if rail in said.power_mw]
    return replace(
        state,
        temperature_c=max(heat, default=None) if state.temperature_c is None else state.temperature_c,
        gpu_load=said.gpu_load if state.gpu_load is None else state.gpu_load,
        power_w=next(iter(power), None) if state.power_w is None else state.power_w,
    )
