"""TextDevice: the object that an app holds to generate text.

with kinflow.TextDevice.open("families/smollm2/bundle") as device:
    for token in device.generate("Why is the sky blue?"):
        print(token.text, end="")
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from msgspec import ValidationError, convert

from kinflow.errors import InputError, SettingsError
from kinflow.policy import NoRoute, Rate
from kinflow.settings import DeviceSettings
from kinflow.signing import TrustedKeys
from kinflow.text.draft import Acceptance, Pace
from kinflow.text.drafter import DeviceModel, Drafter
from kinflow.text.family import TextFamily
from kinflow.text.generation import Generation, Limits
from kinflow.text.manifest import IDS, Precision
from kinflow.text.remote import Positions, Remote, Way
from kinflow.text.sampling import Sampling
from kinflow.text.summary import Mode
from kinflow.text.way import choose_way
from kinflow.uplink import Uplink

SWITCHED_OFF = NoRoute("offloading is switched off", by_choice=True)
LOCAL = NoRoute("mode is local", by_choice=True)
NOT_OPEN = NoRoute("the device is not open: use it in a with block")
MODES: tuple[Mode, ...] = ("family", "exact", "confident", "local")


class TextDevice:
    """Drafts with the device member and has servers verify. Use it with `with`; threads may share it."""

    def __init__(self, family: TextFamily, settings: DeviceSettings | None = None) -> None:
        """Opens the device's graphs, starts nothing. Raises FamilyMismatch, BundleError or BackendError."""
        self.family = family
        self.settings = settings or DeviceSettings()
        self.tokenizer = family.tokenizer()
        self._models: dict[Precision, DeviceModel] = {}
        self._lock = threading.Lock()
        self._model("int8")
        self._acceptance = Acceptance()
        self._pace = Pace()
        self._uplink: Uplink | None = None

    @classmethod
    def open(cls, bundle: str | Path, settings: DeviceSettings | None = None) -> TextDevice:
        """From a bundle's folder or .zip. Raises BundleError, FamilyMismatch or BackendError."""
        settings = settings or DeviceSettings()
        return cls(TextFamily.load(bundle, trusted=TrustedKeys.parse(settings.trusted_keys)), settings)

    def __enter__(self) -> TextDevice:
        if self._uplink is not None:
            raise SettingsError("this device is open already: make another one, or leave the with block first")
        if self.settings.offload:
            self._uplink = Uplink.of_device(self.family, self.settings)
            self._uplink.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._uplink is not None:
            self._uplink.close()
            self._uplink = None

    @property
    def pace(self) -> Pace:
        """How fast this device and its servers were lately."""
        return self._pace

    def wait_for_server(self, timeout_s: float) -> bool:
        """True as soon as a server can be asked. An app need not wait: until then tokens are local."""
        way = self._family_way
        return self._uplink is not None and self._uplink.wait(way.split, [Rate(way.codec, 0)], timeout_s)

    def generate(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: Mode | None = None,
    ) -> Generation:
        """The continuation of a conversation, token by token as it is iterated over.

        `messages`: `{"role": …, "content": …}` each, or the user's one message. `seed`: the same one gives the same
        text; without it a random one where the temperature is above 0. `mode`: docs/generation.md; without it the
        settings' one. Raises InputError.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.continue_from(
            self.tokenizer.chat(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            mode=mode,
        )

    def continue_from(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: Mode | None = None,
        max_drafts: int | None = None,
    ) -> Generation:
        """As `generate`, from token ids. `max_drafts`: instead of the settings' one; 0 decodes one by one."""
        text = self.settings.text
        mode = mode or text.mode
        limits = Limits(
            text.max_tokens if max_tokens is None else max_tokens,
            self.family.manifest.context,
            text.draft_floor,
            text.max_drafts if max_drafts is None else max_drafts,
        )
        self._check(prompt, mode, limits)
        seed = secrets.randbits(62) if seed is None and temperature > 0 else seed or 0
        sampling = _sampling(temperature, top_p, seed)
        remote: Remote | NoRoute
        way = self._way(mode)
        precision: Precision = "float" if mode == "exact" and way.codec != IDS else "int8"
        model = self._model(precision)
        positions = Positions()
        if mode == "local" or self._uplink is None:
            remote = LOCAL if mode == "local" else NOT_OPEN if self.settings.offload else SWITCHED_OFF
            codec = None
        else:
            remote = Remote(
                self.family,
                self._uplink,
                way,
                sampling,
                positions,
                exact=mode == "exact",
                deadline_s=text.verify_timeout_s,
            )
            codec = None if way.codec == IDS else self.family.codec(way.split, way.codec)
        exit_spec = self.family.manifest.exits[model.exit]
        return Generation(
            mode,
            prompt,
            sampling,
            limits,
            Drafter(model),
            exit_spec,
            codec,
            self.tokenizer,
            positions,
            remote,
            self._acceptance,
            self._pace,
        )

    @property
    def _family_way(self) -> Way:
        """The device's own features, coded as the bundle prefers."""
        split = self._models["int8"].split
        return Way(split, next(iter(self.family.manifest.splits[split].codecs)))

    def _way(self, mode: Mode) -> Way:
        if mode != "exact":
            return self._family_way
        return choose_way(self.family, self._uplink, self._exact_features, self._pace.step_s)

    @property
    def _exact_features(self) -> Way | None:
        """Features that lose next to nothing; None where the bundle has no codec for them."""
        codecs = self.family.manifest.splits[self._family_way.split].codecs
        f16 = next((name for name, codec in codecs.items() if codec.kind == "token-f16"), None)
        return None if f16 is None else Way(self._family_way.split, f16)

    def _model(self, precision: Precision) -> DeviceModel:
        """Opened at its first use: few apps need both."""
        with self._lock:
            if precision not in self._models:
                self._models[precision] = DeviceModel.open(self.family, precision, self.settings.threads)
            return self._models[precision]

    def _check(self, prompt: Sequence[int], mode: str, limits: Limits) -> None:
        manifest = self.family.manifest
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}: it must be one of {', '.join(MODES)}")
        if not prompt:
            raise InputError("the prompt is empty")
        if limits.max_tokens < 1:
            raise InputError(f"max_tokens is {limits.max_tokens}: at least 1 is needed")
        if len(prompt) >= manifest.context:
            raise InputError(f"the prompt has {len(prompt)} tokens, {manifest.id} takes fewer than {manifest.context}")
        wrong = next((token for token in prompt if not 0 <= token < manifest.vocabulary), None)
        if wrong is not None:
            raise InputError(f"the prompt has token {wrong}, the vocabulary ends at {manifest.vocabulary - 1}")


def _sampling(temperature: float, top_p: float, seed: int) -> Sampling:
    """Raises InputError."""
    try:
        return convert([temperature, top_p, seed], Sampling)
    except ValidationError as exc:
        raise InputError(f"temperature {temperature!r}, top_p {top_p!r}, seed {seed!r}: {exc}") from exc
