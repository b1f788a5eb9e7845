"""What each member says of each image, computed apart from all servers: the measure of every answer under chaos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kinflow.bundle import MANIFEST
from kinflow.confidence import read
from kinflow.family import Family
from kinflow.preprocess import Preprocessor

Images = npt.NDArray[np.uint8]
# Servers compute in batches: sums in another order differ in the last digits.
TOLERANCE = 1e-3
# How much is offloaded by devices, and escalated by edge servers, under chaos.
OFFLOADED = 0.7
ESCALATED = 0.4


class Expected:
    """The possible (label, confidence) of every image, by tier and the codec that left the device."""

    def __init__(self, family: Family, images: Images) -> None:
        self._family = family
        prepare = Preprocessor(family.preprocess)
        self._batch = np.concatenate([prepare(image) for image in images])
        manifest = family.manifest
        device = family.member("device").run(self._batch)
        assert device.features is not None
        assert device.split is not None
        self._answers: dict[tuple[str, str], list[list[tuple[int, float]]]] = {
            ("device", ""): [self._read(device.logits, device.exit)]
        }
        for codec in manifest.splits[device.split].codecs:
            features = self._through(device.split, codec, device.features)
            edge = family.member("edge", source=device.split).run(features)
            self._answers["edge", codec] = [self._read(edge.logits, edge.exit)]
            ways = [(device.split, features)]
            if edge.split is not None and edge.features is not None:
                ways += [
                    (edge.split, self._through(edge.split, name, edge.features))
                    for name in manifest.splits[edge.split].codecs
                ]
            clouds = [family.member("cloud", source=split).run(coded) for split, coded in ways]
            self._answers["cloud", codec] = [self._read(cloud.logits, cloud.exit) for cloud in clouds]

    def right(self, image: int, tier: str, codec: str, label: int, confidence: float) -> bool:
        """Whether that tier's member says so of that image, along one of the ways that lead to it."""
        key = (tier, "" if tier == "device" else codec)
        return any(
            label == answers[image][0] and abs(confidence - answers[image][1]) < TOLERANCE
            for answers in self._answers.get(key, [])
        )

    def confidences(self, tier: str) -> list[float]:
        """Sorted, of all images, with the first codec."""
        answers = next(found for (name, _), found in self._answers.items() if name == tier)
        return sorted(confidence for _, confidence in answers[0])

    def _through(self, split: str, codec: str, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        coder = self._family.codec(split, codec)
        return np.stack([coder.decode(coder.encode(item)) for item in features])

    def _read(self, logits: npt.NDArray[np.float32], exit_: str) -> list[tuple[int, float]]:
        temperature = self._family.manifest.exits[exit_].temperature
        return [(found.label, found.confidence) for found in (read(row, temperature) for row in logits)]


def unsure_copy(bundle: Path, folder: Path, images: Images) -> Path:
    """The bundle with thresholds that offload OFFLOADED and escalate ESCALATED of these images."""
    shutil.copytree(bundle, folder)
    expected = Expected(Family.load(bundle), images)
    document = json.loads((folder / MANIFEST).read_text())
    for tier, share in (("device", OFFLOADED), ("edge", ESCALATED)):
        confidences = expected.confidences(tier)
        last = document["members"][tier]["segments"][-1]
        document["exits"][document["segments"][last]["exit"]]["threshold"] = min(
            1.0, confidences[int(share * len(confidences))]
        )
    (folder / MANIFEST).write_text(json.dumps(document))
    return folder


def set_version(bundle: Path, version: str) -> None:
    document = json.loads((bundle / MANIFEST).read_text())
    document["version"] = version
    (bundle / MANIFEST).write_text(json.dumps(document))
