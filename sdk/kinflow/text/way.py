"""How a text in mode `exact` travels: features as float16, or token ids alone."""

from __future__ import annotations

from kinflow.policy import NoRoute, Rate
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from kinflow.text.remote import ID_BYTES, Way
from kinflow.uplink import Uplink

IDS_WAY = Way(IDS, IDS)


def choose_way(family: TextFamily, uplink: Uplink | None, features: Way | None, step_s: float) -> Way:
    """Ids where no server takes features, or where sending them takes longer than computing them again.

    `step_s`: what the device takes for a token; a server takes no longer for the same layers.
    """
    if features is None or uplink is None:
        return features or IDS_WAY
    size = family.codec(features.split, features.codec).token_bytes
    by_features = uplink.routes(features.split, [Rate(features.codec, size + ID_BYTES)])
    by_ids = uplink.routes(IDS, [Rate(IDS, ID_BYTES)])
    if isinstance(by_ids, NoRoute):
        return features
    if isinstance(by_features, NoRoute):
        return IDS_WAY
    return IDS_WAY if size * by_features[0].estimate.s_per_byte > step_s else features
