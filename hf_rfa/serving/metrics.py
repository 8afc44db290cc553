"""Figures of a running server in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from hf_rfa.serving.sequence import Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The `Observer` of an engine, and the counter of responses; each server has its own registry."""

    def __init__(self, max_batch: int) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._responses = Counter("hf_rfa_http_responses", "Responses.", ["path", "status"], registry=registry)
        self._ended = Counter("hf_rfa_requests", "Requests that have ended, by reason.", ["reason"], registry=registry)
        self._prompt = Counter("hf_rfa_prompt_tokens", "Tokens of prompts that were answered.", registry=registry)
        self._generated = Counter("hf_rfa_generated_tokens", "Tokens generated.", registry=registry)
        self._steps = Counter("hf_rfa_steps", "Steps of the engine.", registry=registry)
        self._failures = Counter("hf_rfa_step_failures", "Steps of the whole batch that failed.", registry=registry)
        self._running = Gauge("hf_rfa_requests_running", "Requests in the batch.", registry=registry)
        self._waiting = Gauge(
            "hf_rfa_requests_waiting", "Requests whose prompt is not read to its end.", registry=registry
        )
        self._most = Gauge("hf_rfa_batch_limit", "Requests that the batch may hold.", registry=registry)
        self._bytes = Gauge(
            "hf_rfa_cache_bytes", "Bytes of the batch's cache, when a request last joined or left.", registry=registry
        )
        self._first = Histogram(
            "hf_rfa_time_to_first_token_seconds", "From the request to its first token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._next = Histogram(
            "hf_rfa_time_per_token_seconds", "Between two tokens of a request.", buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "hf_rfa_request_seconds", "From the request to its end.", buckets=_SECONDS, registry=registry
        )
        self._most.set(max_batch)
        for reason in ("stop", "length", "cancelled", "failed"):  # so that each is there before it happens
            self._ended.labels(reason)

    def token(self, sequence: Sequence, seconds: float) -> None:
        self._generated.inc()
        if sequence.last_token is None:
            self._prompt.inc(len(sequence.order.prompt))
            self._first.observe(seconds)
        else:
            self._next.observe(seconds)

    def left(self, sequence: Sequence, reason: str, seconds: float) -> None:
        self._ended.labels(reason).inc()
        self._whole.observe(seconds)

    def stepped(self, running: int, waiting: int, cache_bytes: int) -> None:
        self._steps.inc()
        self._running.set(running)
        self._waiting.set(waiting)
        self._bytes.set(cache_bytes)

    def step_failed(self) -> None:
        self._failures.inc()

    def responded(self, path: str, status: int) -> None:
        """Count a response of the server."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)
