"""Interfaces, multicast and the MQTT broker."""

from __future__ import annotations

import ipaddress
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from kinflow.advert import local_networks
from kinflow.cli.health import Check
from kinflow.discovery import Advert, Browser, Node
from kinflow.errors import DiscoveryError, SettingsError
from kinflow.link import Link
from kinflow.mqtt import BrokerAddress
from kinflow.settings import TlsSettings
from kinflow.tls import Credentials

MULTICAST_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 3.0
RENEW_DAYS = 30
# Debian installs mosquitto where an ordinary user's PATH does not look.
EXTRA_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def interfaces(asked: Sequence[str]) -> list[Check]:
    """Which addresses there are, and whether those in the settings are among them."""
    present = local_networks()
    found = ", ".join(f"{address}/{network.prefixlen}" for address, network in present.items())
    if not present:
        return [Check("interfaces", "fail", "no IPv4 address", "bring an interface up: ip link, nmcli")]
    missing = [address for address in asked if address not in present]
    if missing:
        advice = "correct `interfaces` in the settings, or bring that interface up"
        return [Check("interfaces", "fail", f"no {', '.join(missing)}; there are {found}", advice)]
    if all(network.is_loopback for network in present.values()):
        advice = "connect this machine: only servers on itself can be found"
        return [Check("interfaces", "warn", f"{found}: loopback alone", advice)]
    return [Check("interfaces", "ok", found)]


def multicast(asked: Sequence[str]) -> list[Check]:
    """Announce something on each interface and find it again: packets really go out and come in."""
    addresses = list(asked) or [a for a in local_networks() if not ipaddress.IPv4Address(a).is_loopback]
    addresses = addresses or ["127.0.0.1"]
    with ThreadPoolExecutor(min(len(addresses), 8)) as pool:
        problems = list(pool.map(_hear_oneself, addresses))
    checks = []
    for address, problem in zip(addresses, problems, strict=True):
        if not problem:
            checks.append(Check("multicast", "ok", f"an advert on {address} was announced and found"))
            continue
        advice = "allow UDP port 5353 and multicast (nft list ruleset), or name `broker` in the settings"
        checks.append(Check("multicast", "warn" if "" in problems else "fail", f"{address}: {problem}", advice))
    return checks


def certificate(tls: TlsSettings) -> list[Check]:
    """Who this machine is under TLS, and for how long."""
    try:
        credentials = Credentials.load(tls)
    except SettingsError as exc:
        return [Check("certificate", "fail", str(exc), "kinflow pki issue makes the folder that tls.folder names")]
    if credentials is None:
        if tls.insecure_lan:
            advice = "kinflow pki issue; then set tls.folder, and take insecure_lan out"
            return [Check("certificate", "warn", "no TLS, and servers on the LAN are asked without it", advice)]
        advice = "to use servers on a LAN: set tls.folder to what kinflow pki issue makes"
        return [Check("certificate", "ok", "no TLS: servers on this machine alone are asked", advice)]
    found = f"{credentials.identity}, valid for {credentials.days_left:.0f} days"
    if credentials.days_left < RENEW_DAYS:
        return [Check("certificate", "warn", found, "issue another: kinflow pki issue --renew")]
    return [Check("certificate", "ok", found)]


def broker(configured: str, tls: TlsSettings) -> list[Check]:
    """What a server could start here, and whether the broker in the settings answers."""
    checks = []
    mosquitto = shutil.which("mosquitto") or shutil.which("mosquitto", path=EXTRA_PATH)
    embedded = find_spec("iotcore") is not None
    if mosquitto:
        checks.append(Check("broker", "ok", f"mosquitto is installed: {mosquitto}"))
    elif embedded:
        found = "mosquitto is not installed; the embedded broker is, and serves loopback alone"
        checks.append(Check("broker", "ok", found, "for a server on a LAN: apt install mosquitto"))
    else:
        advice = "only a server needs one: apt install mosquitto, or pip install 'kinflow[broker]'"
        checks.append(Check("broker", "warn", "no broker is installed", advice))
    if configured:
        checks.append(_reach(configured, tls))
    return checks


def _hear_oneself(address: str) -> str:
    """What is wrong; empty when the own advert was found."""
    name = f"doctor-{os.urandom(4).hex()}"
    # Port 9 (discard): nobody shall connect to a node that is not there.
    node = Node(name, "device", address, 9, ())
    try:
        with Browser(interfaces=[address]) as browser:
            browser.check()
            with Advert(node, interfaces=[address]) as advert:
                advert.check()
                start = time.monotonic()
                while time.monotonic() - start < MULTICAST_TIMEOUT_S:
                    if any(found.node == name for found in browser.nodes()):
                        return ""
                    time.sleep(0.005)
    except DiscoveryError as exc:
        return str(exc)
    return f"the own advert did not come back within {MULTICAST_TIMEOUT_S:.0f} s"


def _reach(configured: str, tls: TlsSettings) -> Check:
    try:
        address = BrokerAddress.parse(configured)
        credentials = Credentials.load(tls)
    except SettingsError as exc:
        return Check("broker", "fail", str(exc), "correct `broker` or `tls` in the settings")
    start = time.monotonic()
    with Link(address, f"doctor-{os.urandom(6).hex()}", tls=credentials) as link:
        if not link.wait_connected(CONNECT_TIMEOUT_S):
            advice = "is it running, does it bind that address, does a firewall block its port?"
            return Check("broker", "fail", f"no MQTT connection to {address}", advice)
        return Check("broker", "ok", f"connected to {address} in {(time.monotonic() - start) * 1e3:.0f} ms")
