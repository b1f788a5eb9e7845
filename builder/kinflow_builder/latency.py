"""Latency of a family in service: compute and coding measured here, links as stated.

L = t_device + sum over hops of the share that takes the hop x (t_encode + RTT + 8 bytes / bandwidth + t_decode +
t_member). No queues: one device alone with its servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kinflow.family import INPUT, Family
from kinflow.manifest import BackendName
from kinflow_builder.curves import ImageKind, ImagePoint, decode, encode
from kinflow_builder.folders import Pixels
from kinflow_builder.measure import Array, TierRun, median_s, sources
from kinflow_builder.service import Cascade

IMAGE_QUALITY = 75


@dataclass(frozen=True)
class Link:
    """Between a device and its edge server, or between that and the cloud."""

    name: str
    rtt_s: float
    bits_per_s: float

    def seconds(self, size_bytes: float) -> float:
        """For a message of that size there, and a short one back."""
        return self.rtt_s + 8 * size_bytes / self.bits_per_s

    @property
    def text(self) -> str:
        return f"{self.name}, {self.bits_per_s / 1e6:g} Mbit/s, RTT {1e3 * self.rtt_s:g} ms"


LINKS = (Link("Wi-Fi", 0.005, 20e6), Link("mobile", 0.05, 2e6), Link("narrow band", 0.2, 5e4))
TO_THE_CLOUD = Link("edge to cloud", 0.02, 100e6)


@dataclass(frozen=True)
class Times:
    """Medians of one image, one thread."""

    member_s: dict[str, float]
    """Each from where it begins in service."""
    encode_s: dict[str, float]
    """By split, its default codec."""
    decode_s: dict[str, float]
    whole_s: float
    """The largest member from the input."""
    image_s: dict[str, float]
    """By kind of file, encoded and decoded at quality `IMAGE_QUALITY`."""
    device_s: dict[str, float]
    """The smallest member by backend."""


def measured(family: Family, image: Pixels, inputs: Array) -> Times:
    """`inputs`: that image, preprocessed, [1, channels, height, width]."""
    manifest = family.manifest
    plan = sources(manifest)
    first, last = next(iter(plan)), list(plan)[-1]
    arrived = {INPUT: inputs}
    member_s, encode_s, decode_s = {}, {}, {}
    for name, source in plan.items():
        member, features = family.member(name, source=source), arrived[source]
        output = member.run(features)
        member_s[name] = median_s(partial(member.run, features))
        if output.split is not None and output.features is not None and output.split in plan.values():
            codec, item = family.codec(output.split), output.features[0]
            coded = codec.encode(item)
            encode_s[output.split] = median_s(partial(codec.encode, item))
            decode_s[output.split] = median_s(partial(codec.decode, coded))
            arrived[output.split] = codec.decode(coded)[None]
    segments = [manifest.segments[segment] for segment in manifest.members[first].segments]
    backends: tuple[BackendName, ...] = ("onnx", "tflite")
    there = [backend for backend in backends if all(backend in segment.graphs for segment in segments)]
    return Times(
        member_s=member_s,
        encode_s=encode_s,
        decode_s=decode_s,
        whole_s=median_s(partial(family.member(last).run, inputs)),
        image_s={kind: _image_s(image, kind, manifest.preprocess.mode) for kind in ("JPEG", "WEBP")},
        device_s={backend: median_s(partial(family.member(first, backend=backend).run, inputs)) for backend in there},
    )


def of_family(times: Times, runs: Sequence[TierRun], service: Cascade, link: Link) -> float:
    """Mean seconds of an answer. The first hop takes `link`, the later ones the edge's line to the cloud."""
    total = times.member_s[runs[0].member]
    coded_at = ""
    for hop, run in enumerate(runs[1:]):
        way = link if hop == 0 else TO_THE_CLOUD
        # What a tier forwards as it came is not encoded again.
        encoded = 0.0 if run.source == coded_at else times.encode_s[run.source]
        coded_at = run.source
        each = encoded + way.rtt_s + times.decode_s[run.source] + times.member_s[run.member]
        total += service.reached[run.member] * each + 8 * service.hop_bytes[run.member] / way.bits_per_s
    return total


def of_images(times: Times, point: ImagePoint, kind: ImageKind, link: Link) -> float:
    """Mean seconds when every image goes as a file to the largest member, by way of the edge where there is one."""
    ways = [link, TO_THE_CLOUD][: len(times.member_s) - 1]
    return times.image_s[kind] + sum(way.seconds(point.bytes_mean) for way in ways) + times.whole_s


def _image_s(image: Pixels, kind: ImageKind, mode: str) -> float:
    return median_s(lambda: decode(encode(image, kind, quality=IMAGE_QUALITY), mode))
