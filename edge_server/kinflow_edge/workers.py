"""A server's workers as one: one for each task that it has families of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from kinflow import topics
from kinflow.frame import Buffer
from kinflow.messages import Served, Tier
from kinflow.mqtt import Connection
from kinflow.settings import ServerSettings
from kinflow.uplink import Uplink
from kinflow_edge.model import ServedFamily
from kinflow_edge.text.model import ServedText
from kinflow_edge.text.worker import TextWorker
from kinflow_edge.worker import Worker

Model = ServedFamily | ServedText


class Workers:
    """Started and closed together; a message goes to the one whose family it names."""

    def __init__(
        self,
        node: str,
        tier: Tier,
        models: Mapping[str, Model],
        settings: ServerSettings,
        connection: Connection,
        uplinks: Mapping[str, Uplink],
        test_client: str,
    ) -> None:
        """`models` and `uplinks` by family id; `test_client`: under what name the server asks itself."""
        images = {name: model for name, model in models.items() if isinstance(model, ServedFamily)}
        texts = {name: model for name, model in models.items() if isinstance(model, ServedText)}
        self._by_family: dict[str, Worker | TextWorker] = {}
        if images:
            worker = Worker(
                node,
                tier,
                images,
                settings,
                publish=connection.publish,
                publish_all=connection.publish_all,
                drive=connection.drive,
                uplinks={name: uplink for name, uplink in uplinks.items() if name in images},
                test_client=test_client,
            )
            self._by_family.update(dict.fromkeys(images, worker))
        if texts:
            text_worker = TextWorker(
                node,
                tier,
                texts,
                settings,
                publish=connection.publish,
                uplinks={name: uplink for name, uplink in uplinks.items() if name in texts},
                test_client=test_client,
            )
            self._by_family.update(dict.fromkeys(texts, text_worker))

    def __iter__(self) -> Iterator[Worker | TextWorker]:
        return iter(dict.fromkeys(self._by_family.values()))

    def start(self, on_close: Callable[[Callable[[], None]], object]) -> None:
        """`on_close` gets what is to be called at the end."""
        for worker in self:
            worker.start()
            on_close(worker.close)

    def on_message(self, topic: str, data: Buffer) -> None:
        """Runs on the network thread."""
        worker = self._by_family.get(topics.family_of(topic))
        if worker is not None:
            worker.on_message(topic, data)

    @property
    def alive(self) -> bool:
        return all(worker.alive for worker in self)

    @property
    def families(self) -> list[Served]:
        return [served for worker in self for served in worker.families]

    @property
    def counts(self) -> Counter[str]:
        """Requests since the start, by what became of them."""
        return sum((worker.desk.counts for worker in self), Counter())

    @property
    def batches(self) -> Counter[int]:
        """How often each batch size was computed."""
        return sum((worker.batches for worker in self), Counter())

    @property
    def rejected(self) -> int:
        return sum(worker.desk.rejected for worker in self)

    @property
    def busy_s(self) -> float:
        """Seconds spent computing since the start."""
        return sum(worker.busy_s for worker in self)

    @property
    def queue_s(self) -> float:
        """How long a new request would wait: the longer one."""
        return max(worker.queue_s for worker in self)

    @property
    def under_way(self) -> int:
        """Requests that were admitted and have no answer yet."""
        return sum(worker.under_way for worker in self)

    @property
    def last_request_s(self) -> float | None:
        """When one came last (time.monotonic()), the server's own tests aside."""
        came_s = [worker.desk.last_request_s for worker in self]
        return max((at_s for at_s in came_s if at_s is not None), default=None)
