"""A family's recipe.toml as typed structs. Unknown keys are errors: a typo must not pass."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from kinflow.errors import SettingsError
from kinflow.manifest import Context, Positive, PositiveFloat, Precision, Preprocess, Share
from kinflow.messages import Name

RECIPE = "recipe.toml"
# Of the trained step: the widest that training shows to the tails.
COARSEST = 2.0
# Levels reach to 8 steps on either side: with finer ones they would hardly reach beyond the features' spread.
FINEST = 0.5

Count = Annotated[int, msgspec.Meta(ge=0)]
# auto: int8 where it costs no exit more than half a point (precision.py), else float.
Wanted = Precision | Literal["auto"]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, msgspec.Meta(gt=0, lt=1)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all below."""


class DataFile(_Strict, frozen=True):
    """One idx file of the data set."""

    name: str
    sha256: Digest
    """Of the file's content without gzip, so that any packing of the same images passes."""


class IdxData(_Strict, frozen=True, tag_field="kind", tag="idx"):
    """A published data set of idx files, looked for in this order: --data, `directories`, the cache, `url`."""

    source: str
    """A line for the card: whose data, where described."""
    license: str
    url: str
    """Each file's address is this one and its name."""
    directories: list[str]
    """Relative ones: to the recipe's folder."""
    train_images: DataFile
    train_labels: DataFile
    test_images: DataFile
    test_labels: DataFile
    held_out: Positive
    """Training images kept for temperature and certificate; never trained on."""
    samples: Positive
    """Test images that go into the family's samples/ folder."""


class FolderData(_Strict, frozen=True, tag_field="kind", tag="folder"):
    """A folder of pictures by class, with parts train/ and test/ or without (folders.py)."""

    source: str
    license: str
    directory: str
    """Relative to the recipe's folder; --data goes before it."""
    held_out: Fraction = 0.2
    """Share of the training pictures that is kept for temperature and certificate; never trained on."""
    test: Fraction = 0.2
    """Share of all pictures that is kept for the card's figures where the folder has no test/."""


Data = IdxData | FolderData


class Network(_Strict, frozen=True):
    """The model."""

    make: Annotated[str, msgspec.Meta(pattern=r"^.+\.py:\w+$")]
    """`file.py:function`, relative to the recipe; called with `options` it returns a Trunk, or a model as
    `branches` takes it apart."""
    options: dict[str, int] = {}


class Branches(_Strict, frozen=True):
    """A plain model as a shared trunk: cut after some of its blocks, with an exit at each cut."""

    after: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Names of blocks, in order, as `kinflow build` lists them."""
    channels: Annotated[list[Positive], msgspec.Meta(min_length=1)]
    """Of the features at each cut."""
    frozen: bool = False
    """The model's own weights stay as they are; only bottlenecks and branches are trained."""
    teacher: bool = False
    """The model as it was given teaches all exits, on top of the labels."""


class Nested(_Strict, frozen=True):
    """A plain model as a family of prefixes: factored, and every member cut out of the same factors."""

    after: str
    """Name of the block behind which the split is, as `kinflow build` lists them."""
    channels: Positive
    """Of the features at the split."""
    sizes: dict[Name, Fraction]
    """Parameters of every member but the last, as a share of the whole model's. The last one is the whole."""
    epochs: Positive
    """Of the whole model, before it is factored; `training.epochs` then train all members together."""
    keep: list[str] = []
    """Modules that no member shrinks, by their names in the model; first layers and heads are worth it."""


class Training(_Strict, frozen=True):
    """Stochastic gradient descent with Nesterov momentum, one learning-rate cycle, averaged weights."""

    epochs: Positive
    batch: Positive
    learning_rate: PositiveFloat
    warmup: Fraction
    """Share of the steps in which the learning rate rises."""
    momentum: Fraction
    weight_decay: NonNegative
    label_smoothing: Share
    average: Fraction
    """Decay of the averaged weights, the ones that ship."""
    exit_weights: dict[Name, PositiveFloat]
    """Weight of each exit's loss."""
    distil: Share
    """Share of an earlier exit's loss that is divergence from the last exit, the rest is from the label."""
    shift: Count
    """Augmentation: images are moved by up to this many pixels each way."""
    mirror: bool
    """Augmentation: half of the images are mirrored."""
    erase: Count
    """Augmentation: side of the square that is blanked, in pixels."""
    unquantised: Share
    """Share of the images whose features pass a split as they are, so that both paths are learnt."""
    coarse: Share
    """Share of the quantised images whose steps are wider, up to twice, so that coarser codecs are learnt too."""
    quantise_from: Share
    """Share of the steps before any feature is quantised; as many again until all that should be are."""
    seed: int
    threads: Positive
    prune: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Share of the well learnt images that an epoch leaves out (kinflow_builder/prune.py)."""


class Merging(_Strict, frozen=True):
    """A codec `<split>-m<clusters>` that merges like tokens first (kinflow/tokens.py)."""

    clusters: Positive
    neighbours: Positive


class Coding(_Strict, frozen=True):
    """One split's codecs: `<split>-q4`, that at other rates, and `<split>-q8`, 16 times as fine."""

    bytes_target: PositiveFloat
    """Training presses the entropy of `<split>-q4` per item below this."""
    context: Context = "channel"
    """What shares statistics: a channel's values, or none, for images that all have the same layout."""
    rates: list[Annotated[float, msgspec.Meta(ge=FINEST, le=COARSEST)]] = []
    """Steps of further codecs `<split>-q4x…`, in steps of `<split>-q4`: above 1 fewer bytes for a slow link, below 1
    more where the tails need them and features stay within the levels' range."""
    default: Annotated[float, msgspec.Meta(ge=FINEST, le=COARSEST)] = 1.0
    """Steps of the codec that is used unless settings name another: 1 for `<split>-q4`, or one of `rates`."""
    merging: list[Merging] = []
    """Further codecs, for features of many tokens."""

    def __post_init__(self) -> None:
        if self.default != 1 and self.default not in self.rates:
            raise ValueError(f"default is {self.default:g}, expected 1 or one of rates, {self.rates}")


class Exit(_Strict, frozen=True):
    """How sure the certificate of one exit must be; an exit without an entry keeps every answer."""

    epsilon: Fraction
    delta: Fraction


class Recipe(_Strict, frozen=True):
    """A family to build. `Recipe.load` is the way to make one."""

    id: Name
    version: Name
    title: str
    license: str
    labels: Annotated[list[str], msgspec.Meta(min_length=2)]
    members: dict[Name, list[Name]]
    """Segments of each member, from the input on."""
    tflite_segments: list[Name]
    """Segments that get a TFLite graph too."""
    preprocess: Preprocess
    data: Data
    network: Network
    training: Training
    coding: dict[Name, Coding]
    exits: dict[Name, Exit]
    branches: Branches | None = None
    """For a network that is no Trunk yet."""
    nested: Nested | None = None
    """For such a network too, instead of `branches`."""
    precision: dict[Name, Wanted] = {}
    float_layers: dict[Name, Count] = {}
    """So many layers with weights stay floats at the beginning of an int8 graph: pixels' own rounding goes furthest."""
    """Of segments' graphs; float where none is given."""

    @classmethod
    def load(cls, folder: Path) -> Recipe:
        """From `folder`/recipe.toml, or a file. Raises SettingsError that names file, field and what was expected."""
        path = folder if folder.suffix == ".toml" else folder / RECIPE
        try:
            raw = path.read_bytes()
        except OSError as exc:
            raise SettingsError(f"{path}: {exc.strerror}: give the folder of a family's recipe") from exc
        try:
            return msgspec.toml.decode(raw, type=cls)
        except msgspec.DecodeError as exc:  # ValidationError is one of them
            raise SettingsError(f"{path}: {exc}") from exc

    def digest(self) -> str:
        """What a checkpoint is bound to: training of another kind must not resume it.

        Exits and texts are not part of it: certificates can be made anew without training again.
        """
        budgets = {split: coding.bytes_target for split, coding in self.coding.items()}
        ways = [way for way in (self.branches, self.nested) if way is not None]
        trained = (self.data, self.preprocess, self.network, self.training, budgets, *ways)
        return hashlib.sha256(msgspec.json.encode(trained, order="deterministic")).hexdigest()
