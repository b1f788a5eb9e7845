"""Three machines on one LAN, each a network namespace: for tests that need a real link between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from brokers import KINDS

IP = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")


def why_not() -> str:
    """Why there is no LAN here; empty when there can be."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if IP is None:
        return "`ip` is not installed: apt install iproute2"
    if "mosquitto" not in KINDS:
        return "mosquitto is not installed: the embedded broker stays on loopback"
    probe = f"kf{os.urandom(3).hex()}"
    made = subprocess.run([IP, "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run([IP, "netns", "del", probe], check=False)
    return ""


def ip(*arguments: str) -> None:
    assert IP is not None
    subprocess.run([IP, *arguments], check=True, capture_output=True, timeout=20)


@dataclass(frozen=True)
class Host:
    """One namespace: its name, its address on the bridge, and what runs a command in it."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        assert IP is not None
        return (IP, "netns", "exec", self.name)


@contextmanager
def three_hosts() -> Iterator[list[Host]]:
    """Device, edge and cloud on 10.77.x.0/24, with no route to anywhere else; gone afterwards."""
    mark, net = os.urandom(3).hex(), f"10.77.{os.urandom(1)[0]}"
    switch = f"kf{mark}-lan"
    with ExitStack() as stack:

        def namespace(name: str) -> None:
            ip("netns", "add", name)
            stack.callback(lambda: suppress_errors("netns", "del", name))
            ip("-n", name, "link", "set", "lo", "up")

        namespace(switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", switch, "link", "set", "br0", "up")
        hosts = []
        for number, role in enumerate(("device", "edge", "cloud"), start=1):
            host = Host(f"kf{mark}-{role}", f"{net}.{number}")
            namespace(host.name)
            ip("link", "add", "eth0", "netns", host.name, "type", "veth", "peer", "name", f"v{number}", "netns", switch)
            ip("-n", switch, "link", "set", f"v{number}", "master", "br0", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "brd", "+", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "route", "add", "224.0.0.0/4", "dev", "eth0")
            hosts.append(host)
        yield hosts


def suppress_errors(*arguments: str) -> None:
    with suppress(subprocess.SubprocessError):
        ip(*arguments)
