"""`kinflow inspect`: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from kinflow.family import Family
    from kinflow.manifest import BackendName, Graph, Manifest

BACKENDS: tuple[BackendName, ...] = ("onnx", "tflite")


def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder or .zip of a bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Verify a bundle and show its members, splits, exits, sizes and certificates."""
    from kinflow.bundle import task_of
    from kinflow.cli import inspect_text
    from kinflow.family import Family
    from kinflow.text.family import TextFamily
    from kinflow.text.manifest import TASK

    about_text = task_of(bundle) == TASK
    description = inspect_text.describe(TextFamily.load(bundle)) if about_text else describe(Family.load(bundle))
    if as_json:
        typer.echo(json.dumps(description))
    else:
        (inspect_text.show if about_text else _show)(description)


def describe(family: Family) -> dict[str, Any]:
    """Everything about a verified bundle, as plain values."""
    manifest = family.manifest
    return {
        "id": manifest.id,
        "version": manifest.version,
        "title": manifest.title,
        "task": manifest.task,
        "license": manifest.license,
        "path": str(family.path),
        "bytes": sum(file.bytes for file in _unique_files(manifest)),
        "files_verified": len(_unique_files(manifest)),
        "labels": manifest.labels,
        "preprocess": msgspec.to_builtins(manifest.preprocess),
        "members": {name: _member(manifest, name) for name in manifest.members},
        "segments": {name: _segment(manifest, name) for name in manifest.segments},
        "splits": {name: _split(manifest, name) for name in manifest.splits},
        "exits": {name: msgspec.to_builtins(spec) for name, spec in manifest.exits.items()},
    }


def _unique_files(manifest: Manifest) -> list[Any]:
    return list({file.path: file for file in manifest.files()}.values())


def _member(manifest: Manifest, name: str) -> dict[str, Any]:
    segments = [manifest.segments[segment] for segment in manifest.members[name].segments]
    graphs = [part.graphs for part in segments]
    last = segments[-1]
    assert last.exit is not None  # Family.load checks it
    return {
        "segments": manifest.members[name].segments,
        "exit": last.exit,
        "accuracy": manifest.exits[last.exit].accuracy,
        "macs": sum(part.macs for part in segments),
        "parameters": sum(part.parameters for part in segments),
        "bytes": {
            backend: sum(part[backend].file.bytes for part in graphs)
            for backend in BACKENDS
            if all(backend in part for part in graphs)
        },
    }


def _segment(manifest: Manifest, name: str) -> dict[str, Any]:
    part = manifest.segments[name]
    return {
        "source": part.source,
        "split": part.split,
        "exit": part.exit,
        "macs": part.macs,
        "parameters": part.parameters,
        "graphs": {backend: _graph(graph) for backend, graph in part.graphs.items()},
    }


def _graph(graph: Graph) -> dict[str, Any]:
    return {"path": graph.file.path, "bytes": graph.file.bytes, "precision": graph.precision}


def _split(manifest: Manifest, name: str) -> dict[str, Any]:
    split = manifest.splits[name]
    codecs = {
        codec: {
            "kind": spec.kind,
            "bits": spec.bits,
            "context": spec.context,
            "bytes_mean": spec.bytes_mean,
            "table_bytes": spec.table.bytes if spec.table else 0,
        }
        for codec, spec in split.codecs.items()
    }
    return {"shape": split.shape, "default_codec": split.default_codec, "codecs": codecs}


def _show(about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    size = about["preprocess"]
    console.print(f"[bold]{about['id']} {about['version']}[/]  {escape(about['title'])}", soft_wrap=True)
    console.print(
        f"{about['task']}, {len(about['labels'])} labels, "
        f"input {size['mode']} {size['height']}x{size['width']}, "
        f"{about['bytes'] / 1e6:.2f} MB in {about['files_verified']} files, every sha256 verified, "
        f"licence {escape(about['license'])}",
        soft_wrap=True,
    )
    for title, table in (
        ("members", _members_table(about["members"])),
        ("segments", _segments_table(about["segments"])),
        ("splits", _splits_table(about["splits"])),
        ("exits", _exits_table(about["exits"])),
    ):
        console.print(f"\n[bold]{title}[/]")
        console.print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        right = column in ("accuracy", "MMAC", "parameters", "onnx kB", "tflite kB", "bits", "mean bytes", "table kB")
        table.add_column(column, justify="right" if right else "left")
    return table


def _members_table(members: dict[str, Any]) -> Any:
    table = _table("member", "segments", "exit", "accuracy", "MMAC", "parameters", "onnx kB", "tflite kB")
    for name, member in members.items():
        table.add_row(
            name,
            " > ".join(member["segments"]),
            member["exit"],
            f"{member['accuracy']:.2%}",
            f"{member['macs'] / 1e6:.2f}",
            f"{member['parameters']:,}",
            _kilobytes(member["bytes"].get("onnx")),
            _kilobytes(member["bytes"].get("tflite")),
        )
    return table


_GRAPH_COLUMNS = ("onnx kB", "precision", "tflite kB", "precision")


def _segments_table(segments: dict[str, Any]) -> Any:
    table = _table("segment", "from", "to split", "exit", "MMAC", "parameters", *_GRAPH_COLUMNS)
    for name, part in segments.items():
        graphs = [part["graphs"].get(backend, {}) for backend in BACKENDS]
        table.add_row(
            name,
            part["source"],
            part["split"] or "",
            part["exit"] or "",
            f"{part['macs'] / 1e6:.2f}",
            f"{part['parameters']:,}",
            *(cell for graph in graphs for cell in _graph_cells(graph)),
        )
    return table


def _graph_cells(graph: dict[str, Any]) -> tuple[str, str]:
    """Size and precision; empty where there is no graph for this backend."""
    return (_kilobytes(graph["bytes"]), graph["precision"] or "not stated") if graph else ("", "")


def _splits_table(splits: dict[str, Any]) -> Any:
    table = _table("split", "shape", "codec", "kind", "context", "bits", "mean bytes", "table kB")
    for name, split in splits.items():
        shape = "x".join(str(side) for side in split["shape"])
        for codec, spec in split["codecs"].items():
            default = " (default)" if codec == split["default_codec"] else ""
            table.add_row(
                name,
                shape,
                codec + default,
                spec["kind"],
                spec["context"],
                str(spec["bits"]),
                f"{spec['bytes_mean']:.0f}",
                _kilobytes(spec["table_bytes"]),
            )
    return table


def _exits_table(exits: dict[str, Any]) -> Any:
    table = _table("exit", "accuracy", "temperature", "threshold", "certificate")
    for name, spec in exits.items():
        certificate = spec["certificate"]
        text = "none"
        if certificate is not None:
            text = (
                f"{certificate['risk']} <= {certificate['epsilon']:g} with probability "
                f"{1 - certificate['delta']:g} from n = {certificate['n']}, "
                f"keeps {certificate['kept_share']:.1%}, data {certificate['data_sha256'][:12]}…"
            )
        row = (
            name,
            f"{spec['accuracy']:.2%}",
            f"{spec['temperature']:.3f}",
            f"{spec['threshold']:.4f}",
            text,
        )
        table.add_row(*row)
    return table


def _kilobytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e3:.1f}"
