"""kinflow: a small device uses a big model's judgement only when it needs it."""

import os

# ONNX Runtime's wheels for Linux report to their maker from 1.29 on. What their import has noted is sent even after
# `disable_telemetry_events`; this alone stops it, and only if it is there before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from kinflow.answer import Answer, Timings
from kinflow.device import Device
from kinflow.errors import (
    BackendError,
    BrokerError,
    BundleError,
    CodecError,
    DiscoveryError,
    FamilyMismatch,
    FrameError,
    InputError,
    KinflowError,
    LinkError,
    SettingsError,
)
from kinflow.family import Family
from kinflow.images import read_image
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BackendError",
    "BrokerError",
    "BundleError",
    "CodecError",
    "Device",
    "DeviceSettings",
    "DiscoveryError",
    "Family",
    "FamilyMismatch",
    "FrameError",
    "InputError",
    "KinflowError",
    "LinkError",
    "SettingsError",
    "TextDevice",
    "Timings",
    "__version__",
    "read_image",
]
