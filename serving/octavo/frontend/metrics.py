"""The front end's numbers and their Prometheus page.

Written by the delivery thread (histograms, tokens, finishes) and by intake and delivery (errors); a number may be read
while it is written, so a page can be one observation behind. Observing costs a bisection and two additions: the
page's objects are made when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from octavo.frontend.key_usage import KeyUsage
from octavo.protocol.messages import EngineInfo, EngineStats

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
           160.0, 320.0)
GAPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Histogram:
    """Counts of observations by upper bound; one writer."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        out, running = [], 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), list(self.counts)):
            running += count
            out.append((bound, float(running)))
        return out


class Metrics:
    """All numbers of one front end."""

    def __init__(self) -> None:
        self.ttft = Histogram(SECONDS)
        self.itl = Histogram(GAPS)
        self.e2e = Histogram(SECONDS)
        self.queue_time = Histogram(SECONDS)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.messages = 0
        self.finishes: Counter[str] = Counter()
        self.errors: Counter[int] = Counter()
        self.requests: Counter[tuple[str, int]] = Counter()  # by dialect and code; 200 is a sequence that ended well
        self.keys = KeyUsage()


class Page:
    """A collector over the front end's numbers and the engine's last word.

    `view` gives (running, waiting, info, stats) of now.
    """

    def __init__(self, metrics: Metrics, *, model_name: str, batch_size: int,
                 view: Callable[[], tuple[int, int, EngineInfo | None, EngineStats | None]]) -> None:
        self._metrics = metrics
        self._model_name = model_name
        self._batch_size = batch_size
        self._view = view
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> str:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        running, waiting, info, stats = self._view()
        yield from self._states(running, waiting, info, stats or EngineStats())
        yield from self._requests()
        yield from self._tokens(stats or EngineStats())
        yield from self._keys()

    def _states(self, running: int, waiting: int, info: EngineInfo | None, stats: EngineStats) -> Iterator[Metric]:
        blocks = info.num_blocks if info is not None else 0
        used = stats.num_used_blocks
        share = used / blocks if blocks else 0.0
        yield from self._gauge("requests_running", "Sequences that the engine runs", running, "num_requests_running")
        yield from self._gauge("requests_waiting", "Sequences that wait", waiting, "num_requests_waiting")
        yield from self._gauge("blocks_total", "Blocks of the cache", blocks)
        yield from self._gauge("blocks_used", "Blocks in use", used)
        yield from self._gauge("blocks_cached", "Reusable blocks of finished prefixes", stats.num_cached_blocks)
        aliases = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
        yield from self._gauge("cache_usage", "Share of blocks in use", share, *aliases)
        for name, doc, value in (
            ("batch_size", "Sequences running", running),
            ("max_batch_size", "Most sequences that run at once", self._batch_size),
            ("block_num", "Blocks in use", used),
            ("max_block_num", "Blocks of the cache", blocks),
            ("available_resource", "Share of blocks that are not in use", 1.0 - share if blocks else 0.0),
        ):
            yield GaugeMetricFamily(name, doc, value=value)

    def _requests(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield from self._histogram("time_to_first_token_seconds", "Arrival to first message", metrics.ttft)
        yield from self._histogram("inter_token_latency_seconds", "Gap between tokens as they are sent", metrics.itl)
        yield from self._histogram("e2e_request_latency_seconds", "Arrival to last message", metrics.e2e)
        yield from self._histogram("request_queue_time_seconds", "Arrival to scheduling", metrics.queue_time)
        finishes = dict(metrics.finishes)
        yield from self._labelled("request_success", "Sequences by end", "finished_reason", finishes, alias=True)
        errors = {str(code): count for code, count in dict(metrics.errors).items()}
        yield from self._labelled("errors", "Requests refused or failed, by code", "code", errors)
        yield self._traffic()

    def _traffic(self) -> Metric:
        doc = "Sequences that ended (code 200) and requests refused or failed, by dialect"
        family = CounterMetricFamily("octavo_requests", doc, labels=["dialect", "code"])
        for (dialect, code), count in sorted(dict(self._metrics.requests).items()):
            family.add_metric([dialect, str(code)], count)
        return family

    def _tokens(self, stats: EngineStats) -> Iterator[Metric]:
        metrics = self._metrics
        yield from self._counter("prompt_tokens", "Tokens of prompts", metrics.prompt_tokens, "prompt_tokens")
        yield from self._counter("generation_tokens", "Tokens sent", metrics.generation_tokens, "generation_tokens")
        yield from self._counter("messages", "Messages sent", metrics.messages)
        yield from self._counter("preemptions", "Sequences put back", stats.num_preemptions, "num_preemptions")
        yield from self._counter("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_query_tokens,
                                 "prefix_cache_queries", "gpu_prefix_cache_queries")
        yield from self._counter("prefix_cache_hits", "Prompt tokens found", stats.prefix_hit_tokens,
                                 "prefix_cache_hits", "gpu_prefix_cache_hits")
        yield from self._counter("drafts", "Guesses of tokens that were verified", stats.num_drafts,
                                 "spec_decode_num_drafts")
        yield from self._counter("draft_tokens", "Tokens guessed", stats.draft_tokens, "spec_decode_num_draft_tokens")
        yield from self._counter("accepted_tokens", "Guessed tokens that came true", stats.accepted_tokens,
                                 "spec_decode_num_accepted_tokens")
        yield from self._counter("engine_steps", "Steps of the engine since its start", stats.steps)

    def _keys(self) -> Iterator[Metric]:
        """By the start of the key's digest; the key itself is nowhere."""
        for name, doc in (
            ("requests", "Requests accepted"),
            ("refused", "Requests refused because the queue was full"),
            ("prompt_tokens", "Tokens of prompts"),
            ("generation_tokens", "Tokens generated"),
        ):
            family = CounterMetricFamily(f"octavo_key_{name}", f"{doc}, by API key", labels=["key"])
            for key, usage in self._metrics.keys.items():
                family.add_metric([key], getattr(usage, name))
            yield family

    def _gauge(self, name: str, doc: str, value: float, *aliases: str) -> Iterator[Metric]:
        yield GaugeMetricFamily(f"octavo_{name}", doc, value=value)
        for alias in aliases:
            family = GaugeMetricFamily(f"vllm:{alias}", doc, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family

    def _counter(self, name: str, doc: str, value: float, *aliases: str) -> Iterator[Metric]:
        yield CounterMetricFamily(f"octavo_{name}", doc, value=value)
        for alias in aliases:
            family = CounterMetricFamily(f"vllm:{alias}", doc, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family

    def _labelled(self, name: str, doc: str, label: str, values: dict[str, int], *,
                  alias: bool = False) -> Iterator[Metric]:
        ours = CounterMetricFamily(f"octavo_{name}", doc, labels=[label])
        theirs = CounterMetricFamily(f"vllm:{name}", doc, labels=["model_name", label])
        for key, value in sorted(values.items()):
            ours.add_metric([key], value)
            theirs.add_metric([self._model_name, key], value)
        yield ours
        if alias:
            yield theirs

    def _histogram(self, name: str, doc: str, histogram: Histogram) -> Iterator[Metric]:
        buckets = histogram.buckets()
        yield HistogramMetricFamily(f"octavo_{name}", doc, buckets=buckets, sum_value=histogram.total)
        family = HistogramMetricFamily(f"vllm:{name}", doc, labels=["model_name"])
        family.add_metric([self._model_name], buckets, histogram.total)
        yield family
