"""What a server counts, in Prometheus's text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """The numbers of one server: requests by status, how long they took, how many are in the house, pictures a step."""

    def __init__(self):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "fastrcnn_requests", "requests to /detect by the status of their answer", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "fastrcnn_request_seconds", "from a request's head to its answer, those of status 200",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60), registry=registry,
        )  # fmt: skip
        self.taken = Gauge("fastrcnn_taken", "requests that are taken and not yet answered", registry=registry)
        self.batch = Histogram(
            "fastrcnn_batch_pictures", "pictures in a step of the model", buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )  # fmt: skip
        self.objects = Counter("fastrcnn_objects", "objects found", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
