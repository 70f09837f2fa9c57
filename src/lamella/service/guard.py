"""What every request passes: its size, its host, its origin, its rate; and the headers of every answer. No torch."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lamella.service.problems import problem

MAX_BODY_BYTES = 1_000_000
MOST_CALLERS = 10_000
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass
class Bucket:
    """Tokens of one caller: `rate` a second come, `burst` are held."""

    rate: float
    burst: float
    tokens: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tokens = self.burst

    def wait(self) -> float:
        """Seconds until the caller may call again; 0: now, and a token is taken."""
        now = time.monotonic()
        self.tokens, self.at = min(self.burst, self.tokens + (now - self.at) * self.rate), now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.rate


class Rates:
    """A bucket for each caller, of as many callers as came last."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def wait(self, caller: str) -> float:
        """See `Bucket.wait`."""
        bucket = self._buckets.setdefault(caller, Bucket(self.rate, self.burst))
        self._buckets.move_to_end(caller)
        while len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return bucket.wait()


class Figures:
    """What Prometheus reads of requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route")
        self.seconds = Histogram(
            "lamella_http_request_seconds", "Time to the head of an answer.", labels, registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
        )  # fmt: skip
        self.answers = Counter(
            "lamella_http_answers", "Answers by status.", (*labels, "status"), registry=self.registry
        )


class Guard:
    """The outermost layer of the app.

    Args:
        hosts: names by which the service may be called; empty: any. It keeps pages of other sites, whose name was made
            to lead here, from calling a service that asks for no key.
        rates: of each address.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], rates: Rates, figures: Figures):
        self.app, self.hosts, self.rates, self.figures = app, hosts, rates, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
                if scope["path"].startswith("/v1"):
                    own.setdefault("Cache-Control", "no-store")
                route = getattr(scope.get("route"), "path", "none")
                self.figures.seconds.labels(scope["method"], route).observe(time.perf_counter() - began)
                self.figures.answers.labels(scope["method"], route, message["status"]).inc()
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, detail, more = refusal
            await problem(status, detail, headers=more)(scope, receive, with_headers)
            return
        await self.app(scope, _limited(receive), with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str, dict[str, str]] | None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts and name not in self.hosts:
            return 400, f"the service is not called {name[:100]!r}", {}
        origin = headers.get("origin")
        if scope["method"] in UNSAFE and origin and origin.rpartition("://")[2] != host:
            return 403, "the request comes from a page of another site", {}
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, "the length of the body is no number", {}
        if int(length) > MAX_BODY_BYTES:
            return 413, f"the body is larger than {MAX_BODY_BYTES} bytes", {}
        client = scope.get("client") or ("unknown", 0)
        wait = self.rates.wait(f"{client[0]} {headers.get('authorization', '')[:40]}")
        if wait:
            return 429, f"too many requests; wait {wait:.1f} s", {"Retry-After": str(int(wait) + 1)}
        return None


def _limited(receive: Receive) -> Receive:
    """Bodies that do not say how long they are end where too much has come."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > MAX_BODY_BYTES:
                return {"type": "http.disconnect"}
        return message

    return limited
