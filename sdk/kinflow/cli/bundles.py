"""Which bundle a command uses."""

from __future__ import annotations

from pathlib import Path

from kinflow.errors import SettingsError

FAMILIES = Path("families")
DEFAULT_FAMILY = "fashion"
DEFAULT_TEXT_FAMILY = "smollm2"


def choose_text_bundle(bundle: Path | None, family: str | None) -> Path:
    """As `choose_bundle`, of a language model."""
    built = FAMILIES / DEFAULT_TEXT_FAMILY
    if bundle is None and family is None and not (built / "bundle").exists():
        raise SettingsError(
            f"there is no bundle at {built / 'bundle'}: `kinflow build {built}` makes it in a checkout, "
            "or name one with --bundle"
        )
    return choose_bundle(bundle, family or DEFAULT_TEXT_FAMILY)


def choose_bundle(bundle: Path | None, family: str | None) -> Path:
    """`bundle` itself, else families/<family>/bundle below the working directory.

    Raises SettingsError when neither is named and the default one is not there.
    """
    if bundle is not None:
        return bundle
    path = FAMILIES / (family or DEFAULT_FAMILY) / "bundle"
    if not path.exists():
        raise SettingsError(f"there is no bundle at {path}: name one with --bundle, or as a server's argument")
    return path
