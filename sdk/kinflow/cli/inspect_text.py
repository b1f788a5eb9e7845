"""`kinflow inspect` of a language model's bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kinflow.text.manifest import Precision

if TYPE_CHECKING:
    from kinflow.text.family import TextFamily
    from kinflow.text.manifest import TextManifest

SHAPE = ("vocabulary", "width", "layers", "heads", "kv_heads", "head_size", "context")
PRECISIONS: tuple[Precision, ...] = ("float", "int8")


def describe(family: TextFamily) -> dict[str, Any]:
    """Everything about a bundle, as plain values; every file's hash is compared. Raises BundleError."""
    manifest = family.manifest
    files = family.verify()
    return {
        "id": manifest.id,
        "version": manifest.version,
        "title": manifest.title,
        "task": manifest.task,
        "license": manifest.license,
        "path": str(family.path),
        "bytes": sum(file.bytes for file in files),
        "files_verified": len(files),
        "model": {name: getattr(manifest, name) for name in SHAPE},
        "members": {name: _part(manifest, spec.segments) for name, spec in manifest.members.items()},
        "segments": {name: _segment(manifest, name) for name in manifest.segments},
        "splits": {name: _split(family, name) for name in manifest.splits},
        "exits": {
            name: {**msgspec.to_builtins(spec), **_part(manifest, spec.segments)}
            for name, spec in manifest.exits.items()
        },
        "margin_bound": manifest.margin_bound,
    }


def _part(manifest: TextManifest, names: list[str]) -> dict[str, Any]:
    """Several segments together."""
    segments = [manifest.segments[name] for name in names]
    return {
        "segments": names,
        "layers": sum(segment.layers for segment in segments),
        "macs": sum(segment.macs for segment in segments),
        "parameters": sum(segment.parameters for segment in segments),
        "bytes": {
            precision: sum(segment.graphs[precision].file.bytes for segment in segments)
            for precision in PRECISIONS
            if all(precision in segment.graphs for segment in segments)
        },
    }


def _segment(manifest: TextManifest, name: str) -> dict[str, Any]:
    segment = manifest.segments[name]
    about = {"kind": segment.kind, "source": segment.source, "result": segment.result}
    return {**about, **_part(manifest, [name]), "segments": [name]}


def _split(family: TextFamily, name: str) -> dict[str, Any]:
    split = family.manifest.splits[name]
    codecs = {
        codec: {"kind": spec.kind, "token_bytes": family.codec(name, codec).token_bytes}
        for codec, spec in split.codecs.items()
    }
    return {"after_layer": split.after_layer, "codecs": codecs}


def show(about: dict[str, Any]) -> None:
    """As tables."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    model = about["model"]
    console.print(f"[bold]{about['id']} {about['version']}[/]  {escape(about['title'])}", soft_wrap=True)
    console.print(
        f"{about['task']}, {model['layers']} layers of width {model['width']}, {model['vocabulary']:,} tokens, "
        f"context {model['context']}, {about['bytes'] / 1e6:.2f} MB in {about['files_verified']} files, "
        f"every sha256 verified, licence {escape(about['license'])}",
        soft_wrap=True,
    )
    for title, table in (
        ("members", _parts_table("member", about["members"])),
        ("segments", _parts_table("segment", about["segments"])),
        ("splits", _splits_table(about["splits"])),
        ("exits", _exits_table(about["exits"])),
    ):
        console.print(f"\n[bold]{title}[/]")
        console.print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    left = ("member", "segment", "segments", "from > to", "split", "codec", "kind", "exit", "certificate")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def _parts_table(what: str, parts: dict[str, Any]) -> Any:
    way = "segments" if what == "member" else "from > to"
    sizes = [f"{precision} kB" for precision in PRECISIONS]
    table = _table(what, way, "layers", "MMAC per token", "parameters", *sizes)
    for name, part in parts.items():
        ends = [part["source"], part["result"]] if "source" in part else part["segments"]
        table.add_row(
            name,
            " > ".join(ends),
            str(part["layers"]),
            f"{part['macs'] / 1e6:.2f}",
            f"{part['parameters']:,}",
            *(_kilobytes(part["bytes"].get(precision)) for precision in PRECISIONS),
        )
    return table


def _splits_table(splits: dict[str, Any]) -> Any:
    table = _table("split", "after layer", "codec", "kind", "bytes per token")
    for name, split in splits.items():
        for number, (codec, spec) in enumerate(split["codecs"].items()):
            default = "" if number else " (default)"
            table.add_row(name, str(split["after_layer"]), codec + default, spec["kind"], str(spec["token_bytes"]))
    return table


def _exits_table(exits: dict[str, Any]) -> Any:
    table = _table("exit", "segments", "agreement", "perplexity", "temperature", "certificate")
    for name, spec in exits.items():
        certificate = spec["certificate"]
        text = "none"
        if certificate is not None:
            text = (
                f"disagreement <= {certificate['epsilon']:g} with probability {1 - certificate['delta']:g} from "
                f"n = {certificate['n']} above {certificate['threshold']:.4f}, keeps {certificate['kept_share']:.1%}"
            )
        table.add_row(
            name,
            " > ".join(spec["segments"]),
            f"{spec['agreement']:.1%}",
            f"{spec['perplexity']:.2f}",
            f"{spec['temperature']:.3f}",
            text,
        )
    return table


def _kilobytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e3:.1f}"
