"""A run's newest numbers for Prometheus, which asks for them over HTTP."""

import re
import time
from collections.abc import Mapping

from maxlm.config import MaxlmError
from maxlm.run.reporting_config import ReportingConfig


def check_prometheus_port(config: ReportingConfig) -> None:
    """Checks, for process 0, that Prometheus's port is free; raises MaxlmError if it is
    not."""
    if config.prometheus_port is not None:
        PrometheusSink(config.prometheus_address, config.prometheus_port).close()


class PrometheusSink:
    """Answers scrapes at ``/metrics`` with the newest value of each number that a run
    logs.

    ======================================  ============================================
    metric                                  value
    ======================================  ============================================
    ``maxlm_NAME``, gauge                   number NAME of the newest record of
                                            metrics.jsonl that has it: ``maxlm_loss``,
                                            ``maxlm_mfu``, ...; characters that
                                            Prometheus does not allow are underscores
    ``maxlm_step``, gauge                   updates made so far
    ``maxlm_last_step_timestamp``, gauge    Unix seconds at which the newest record was
                                            logged
    ``maxlm_time_seconds_total``, counter   seconds of this attempt by ``activity``, as
                                            ``progress`` events count them
    ``maxlm_events_total``, counter         events of this attempt by ``event``
    ======================================  ============================================

    Args:
        address: name or address to listen at; 127.0.0.1 answers this host alone.

    Raises MaxlmError where it cannot listen there.
    """

    def __init__(self, address: str, port: int):
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            start_http_server,
        )

        self._registry = CollectorRegistry()
        self._gauge_class = Gauge
        self._gauges: dict[str, Gauge] = {}
        # Seconds by activity that the counter has; ``progress`` events are cumulative.
        self._counted_seconds: dict[str, float] = {}
        self._seconds = Counter(
            "maxlm_time_seconds",
            "Seconds of this attempt",
            ["activity"],
            registry=self._registry,
        )
        self._events = Counter(
            "maxlm_events", "Events of this attempt", ["event"], registry=self._registry
        )
        try:
            self._server, self._thread = start_http_server(
                port, address, self._registry
            )
        except (OSError, UnicodeError) as error:
            # UnicodeError: no name of a host at all.
            reason = getattr(error, "strerror", None) or error
            message = f"cannot listen at {address} port {port}: {reason}"
            where = "reporting.prometheus_port"
            fix = (
                "name a free port, and an address of this host or 0.0.0.0 for all of "
                "them"
            )
            raise MaxlmError(message, where=where, fix=fix) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._set(name, value)
        self._set("step", step)
        self._set("last_step_timestamp", time.time())

    def event(self, kind: str, details: Mapping[str, float]) -> None:
        """Counts an event; ``details`` of ``progress``: seconds by activity, cumulative
        since the last rollback."""
        self._events.labels(kind).inc()
        if kind == "rollback":
            self._counted_seconds = {}
        elif kind == "progress":
            for activity, seconds in details.items():
                before = self._counted_seconds.get(activity, 0.0)
                self._seconds.labels(activity).inc(seconds - before)
            self._counted_seconds = dict(details)

    def rewind(self, step: int) -> None:
        self._set("step", max(step, 0))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, name: str, value: float) -> None:
        metric = "maxlm_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        if metric not in self._gauges:
            self._gauges[metric] = self._gauge_class(
                metric, f"Newest value of {name}", registry=self._registry
            )
        self._gauges[metric].set(value)
