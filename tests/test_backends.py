"""The runtimes: outputs in the graph's order, and every failure a BackendError that names the file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kinflow import backends, manifest
from kinflow.backends import onnx as onnx_backend
from kinflow.backends import tflite as tflite_backend
from kinflow.errors import BackendError
from kinflow.family import Family
from kinflow.manifest import BackendName, Graph

TFLITE = pytest.mark.skipif(
    find_spec("ai_edge_litert") is None and find_spec("tflite_runtime") is None,
    reason="no TFLite runtime is installed: pip install 'kinflow[tflite]'",
)


@pytest.fixture(scope="module")
def device_graphs(fashion: Path) -> tuple[Family, dict[BackendName, Graph]]:
    """The committed family and its device member's one segment."""
    family = Family.load(fashion)
    (segment,) = family.manifest.members["device"].segments
    return family, family.manifest.segments[segment].graphs


def noise(graph: Graph, items: int) -> backends.Array:
    return np.random.default_rng(0).normal(size=(items, *graph.input.shape)).astype(np.float32)


@pytest.mark.parametrize("backend", ["onnx", pytest.param("tflite", marks=TFLITE)])
def test_outputs_come_in_the_manifests_order_and_shapes(
    device_graphs: tuple[Family, dict[BackendName, Graph]], backend: BackendName
) -> None:
    """float32, batch axis first, for one item and for several, each item as if it came alone."""
    family, graphs = device_graphs
    graph = graphs[backend]
    runner = backends.open_graph(backend, family.files[graph.file.path], graph, 1)
    batch = noise(graph, 3)
    outputs = runner.run(batch)
    assert [output.shape for output in outputs] == [(3, *tensor.shape) for tensor in graph.outputs]
    assert all(output.dtype == np.float32 for output in outputs)
    for item in range(3):
        for together, alone in zip(outputs, runner.run(batch[item : item + 1]), strict=True):
            np.testing.assert_allclose(together[item : item + 1], alone, atol=1e-5)


@TFLITE
def test_both_runtimes_agree(device_graphs: tuple[Family, dict[BackendName, Graph]]) -> None:
    """The same bundle gives the same features and logits on either."""
    family, graphs = device_graphs
    batch = noise(graphs["onnx"], 8)
    results = [
        backends.open_graph(backend, family.files[graph.file.path], graph, 1).run(batch)
        for backend, graph in graphs.items()
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@TFLITE
def test_results_outlive_the_next_run(device_graphs: tuple[Family, dict[BackendName, Graph]]) -> None:
    """What was returned is no view into the interpreter's memory."""
    family, graphs = device_graphs
    graph = graphs["tflite"]
    runner = backends.open_graph("tflite", family.files[graph.file.path], graph, 1)
    first = runner.run(noise(graph, 1))
    copies = [output.copy() for output in first]
    runner.run(np.zeros((1, *graph.input.shape), np.float32))
    assert all(np.array_equal(output, copy) for output, copy in zip(first, copies, strict=True))


@pytest.mark.parametrize("backend", ["onnx", pytest.param("tflite", marks=TFLITE)])
def test_a_runner_may_be_shared_by_threads(
    device_graphs: tuple[Family, dict[BackendName, Graph]], backend: BackendName
) -> None:
    """Each thread gets the answer to its own batch."""
    family, graphs = device_graphs
    graph = graphs[backend]
    runner = backends.open_graph(backend, family.files[graph.file.path], graph, 1)
    batches = list(noise(graph, 8).reshape(8, 1, *graph.input.shape))
    expected = [runner.run(batch)[-1] for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            if not np.allclose(runner.run(batches[index])[-1], expected[index], atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", ["onnx", pytest.param("tflite", marks=TFLITE)])
def test_what_is_no_graph_is_refused(
    device_graphs: tuple[Family, dict[BackendName, Graph]], backend: BackendName
) -> None:
    """The file is named and what the runtime said."""
    _, graphs = device_graphs
    graph = graphs[backend]
    with pytest.raises(BackendError, match=f"{graph.file.path}: .* refuses it"):
        backends.open_graph(backend, b"no graph" * 64, graph, 1)


@pytest.mark.parametrize("backend", ["onnx", pytest.param("tflite", marks=TFLITE)])
def test_a_batch_that_does_not_fit_is_a_backend_error(
    device_graphs: tuple[Family, dict[BackendName, Graph]], backend: BackendName
) -> None:
    """Another shape fails in the runtime and comes out as ours, and the runner still works afterwards."""
    family, graphs = device_graphs
    graph = graphs[backend]
    runner = backends.open_graph(backend, family.files[graph.file.path], graph, 1)
    good = noise(graph, 1)
    with pytest.raises(BackendError, match=graph.file.path):
        runner.run(good[..., :-1])
    assert len(runner.run(good)) == len(graph.outputs)


def test_an_onnx_graph_with_other_names_is_refused(family: Family) -> None:
    """Outputs are taken by place: names that differ mean another graph than the manifest's."""
    graph = family.manifest.segments["trunk0"].graphs["onnx"]
    data = family.files[graph.file.path]
    swapped = msgspec.structs.replace(graph, outputs=graph.outputs[::-1])
    with pytest.raises(BackendError, match="the manifest names others"):
        backends.open_graph("onnx", data, swapped, 1)
    renamed = msgspec.structs.replace(graph, input=manifest.Tensor("y", graph.input.shape))
    with pytest.raises(BackendError, match=r"has the inputs \['x'\]"):
        backends.open_graph("onnx", data, renamed, 1)


@TFLITE
def test_a_tflite_graph_with_other_shapes_is_refused(
    device_graphs: tuple[Family, dict[BackendName, Graph]],
) -> None:
    """TFLite's names say little; its shapes are static and must be the manifest's."""
    family, graphs = device_graphs
    graph = graphs["tflite"]
    other = msgspec.structs.replace(graph, input=manifest.Tensor("x", [9, 9, 9]))
    with pytest.raises(BackendError, match=r"the manifest says .*\(1, 9, 9, 9\)"):
        backends.open_graph("tflite", family.files[graph.file.path], other, 1)


def graph_of_nothing() -> Graph:
    file = manifest.File("g", hashlib.sha256(b"").hexdigest(), 1)
    return Graph(file, manifest.Tensor("x", [1]), [manifest.Tensor("y", [1])], dynamic_batch=True)


def test_a_missing_runtime_is_named_with_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra to install stands in the error."""
    monkeypatch.setattr(onnx_backend, "find_spec", lambda _: None)
    monkeypatch.setattr(tflite_backend, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"pip install 'kinflow\[onnx\]'"):
        backends.open_graph("onnx", b"", graph_of_nothing(), 1)
    with pytest.raises(BackendError, match=r"pip install 'kinflow\[tflite\]'"):
        backends.open_graph("tflite", b"", graph_of_nothing(), 1)


@pytest.mark.parametrize(
    ("installed", "numpy_version", "chosen"),
    [
        ({"tflite_runtime"}, "1.26.4", "tflite_runtime.interpreter"),
        ({"ai_edge_litert"}, "1.26.4", "ai_edge_litert.interpreter"),
        ({"tflite_runtime", "ai_edge_litert"}, "1.26.4", "tflite_runtime.interpreter"),
        ({"tflite_runtime", "ai_edge_litert"}, "2.2.0", "ai_edge_litert.interpreter"),
        ({"tflite_runtime"}, "2.2.0", "numpy<2"),
        (set(), "2.2.0", "no TFLite runtime is installed"),
    ],
)
def test_the_tflite_runtime_is_chosen_by_what_works(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], numpy_version: str, chosen: str
) -> None:
    """tflite-runtime where numpy is old enough for it, else ai-edge-litert, else what to install."""
    monkeypatch.setattr(tflite_backend, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(tflite_backend, "import_module", lambda name: name)
    monkeypatch.setattr(np, "__version__", numpy_version)
    if chosen.endswith(".interpreter"):
        assert tflite_backend.interpreter_module() == chosen
    else:
        with pytest.raises(BackendError, match=chosen):
            tflite_backend.interpreter_module()


@pytest.mark.parametrize(
    "code",
    [
        "from kinflow.backends.onnx import open_session; open_session(b'', 'a.onnx', 1)",
        "from kinflow.text.head import HeadRunner; HeadRunner('head', b'', 'head.onnx', 1)",
    ],
    ids=["images", "text"],
)
def test_a_runtime_that_does_not_load_is_a_named_error(tmp_path: Path, code: str) -> None:
    """A wheel whose native part fails, as under Ctrl-C or on another processor, is no ImportError to an app."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('initialization failed')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "BackendError: ONNX Runtime is installed but does not load: initialization failed" in ended.stderr


def test_the_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """ONNX Runtime notes down an id and its events below the home folder as soon as telemetry is on: it is not."""
    code = (
        "import kinflow, numpy, sys; device = kinflow.Family.load(sys.argv[1]).member('device'); "
        "device.run(numpy.zeros((1, 1, 28, 28), 'f4'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1] / "families/fashion/bundle")],
        env={**environment, "HOME": str(tmp_path)},
        check=True,
        timeout=120,
    )
    assert list(tmp_path.iterdir()) == []
