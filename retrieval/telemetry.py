"""What /metrics shows: requests, their time, what waits, how large batches are, what was refused."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 120)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """Counters of one server, in a registry of their own: two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("unclip_requests", "Answered requests", ["route", "status"], **own)
        self.seconds = Histogram("unclip_request_seconds", "From request to answer", ["route"], buckets=SECONDS, **own)
        self.rejected = Counter("unclip_rejected", "Requests refused at the door", ["reason"], **own)
        self.in_flight = Gauge("unclip_requests_in_flight", "Requests being answered", **own)
        self.queue = Gauge("unclip_queue_length", "Items that wait for a worker", ["queue"], **own)
        self.batch = Histogram("unclip_batch_size", "Items worked on together", ["queue"], buckets=BATCHES, **own)
        self.rows = Gauge("unclip_index_rows", "Rows that can be found", ["index"], **own)
        self.reloads = Counter("unclip_index_reloads", "Times that a changed index was opened anew", ["index"], **own)
        self.pictures = Counter("unclip_pictures_generated", "Pictures drawn", **own)
        started = Gauge("unclip_start_time_seconds", "Unix time of the start", **own)
        started.set(time.time())

    def watch_queue(self, name: str, length: Callable[[], int]) -> Callable[[int], None]:
        """Show length() as this queue's; returns what is to be told the size of each of its batches."""
        self.queue.labels(name).set_function(length)
        return self.batch.labels(name).observe

    def text(self) -> tuple[bytes, str]:
        """The page for Prometheus and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
