"""What a server has done, for Prometheus, under the names that vLLM gives the same things."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
REQUEST_SECONDS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480)


class Metrics:
    """Counters, gauges and histograms of one server, each labelled with its model's name."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        label, registry = ["model_name"], self.registry

        def counter(name: str, meaning: str) -> Counter:
            return Counter(name, meaning, label, registry=registry).labels(model_name)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(name, meaning, label, registry=registry).labels(model_name)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, meaning, label, registry=registry, buckets=buckets).labels(model_name)

        self.num_drafts = counter("vllm:spec_decode_num_drafts", "Calls that verified drafts of a text.")
        self.num_draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.num_accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self.num_accepted_tokens_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their place among the drafts of a call.",
            ["model_name", "position"],
            registry=registry,
        )
        self.num_calls = counter("ptp:text_calls", "Model calls, counted for each text in them.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of texts that began.")
        self.generation_tokens = counter("vllm:generation_tokens", "Verified tokens written.")
        self.finished = Counter(
            "vllm:request_success",
            "Texts that ended, by reason: stop, length, abort (the client went away) or error.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self.rejected = counter("ptp:requests_rejected", "Texts turned away because the queue was full.")
        self.running = gauge("vllm:num_requests_running", "Texts in the making.")
        self.waiting = gauge("vllm:num_requests_waiting", "Texts that wait for a slot.")
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a text's arrival to its first token.", FIRST_TOKEN_SECONDS
        )
        self.token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "A text's mean time per token behind its first call.",
            TOKEN_SECONDS,
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds", "From a text's arrival to its last token.", REQUEST_SECONDS
        )

    def called(self, num_tokens: int, num_drafts: int, num_accepted: int) -> None:
        """A call settled so much of a text."""
        self.num_calls.inc()
        self.generation_tokens.inc(num_tokens)
        self.num_draft_tokens.inc(num_drafts)
        self.num_accepted_tokens.inc(num_accepted)
        if num_drafts:
            self.num_drafts.inc()
        for position in range(num_accepted):
            self.num_accepted_tokens_per_pos.labels(self.model_name, position).inc()

    def ended(self, reason: str) -> None:
        """A text ended."""
        self.finished.labels(self.model_name, reason).inc()

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
