"""Gaudi's metrics, as far as the simulation has them: `graph_compilation`, `recipe_cache`, `cpu_fallback`.

`PT_HPU_METRICS_FILE` names a file that gets the global metrics when the process ends.
"""

import atexit
import contextlib
import datetime
import json
import os
import pathlib

from dropbp.backends.hpu_simulator._session import extension


class MetricNotFound(Exception):
    pass


class Metric:
    """Counts since it was made, reset or, once stopped, until then."""

    def __init__(self, name, read):
        self._name, self._read = name, read
        self._end = None
        self.reset()

    def name(self):
        return self._name

    def start(self):
        self._end = None

    def stop(self):
        self._end = self._end or self._read()

    def reset(self):
        self._start = self._read()

    def stats(self):
        """Pairs of a name and a count, as Gaudi gives them."""
        now = self._end or self._read()
        # The recorder itself may have been reset in between.
        return [(key, max(value - self._start[key], 0)) for key, value in now.items()]


def _graph_compilation():
    return {"TotalNumber": extension().counters()["misses"], "TotalTime": 0, "AvgTime": 0}


def _recipe_cache():
    counters = extension().counters()
    return {"TotalHit": counters["hits"], "TotalMiss": counters["misses"]}


def _cpu_fallback():
    return {"TotalNumber": 0}


_READERS = {"graph_compilation": _graph_compilation, "recipe_cache": _recipe_cache, "cpu_fallback": _cpu_fallback}
_global = {name: Metric(name, read) for name, read in _READERS.items()}


def metric_global(name):
    return _global.get(name)


@contextlib.contextmanager
def metric_localcontext(name):
    if name not in _READERS:
        raise MetricNotFound(f"Metric with given name ({name}) doesn't exist; there are {', '.join(_READERS)}.")
    metric = Metric(name, _READERS[name])
    try:
        yield metric
    finally:
        metric.stop()


def metrics_dump(file_name, triggered_by="user"):
    """Write the global metrics to a JSON file."""
    now = datetime.datetime.now(tz=datetime.timezone.utc).isoformat()
    entries = [
        {"metric_name": name, "triggered_by": triggered_by, "generated_on": now, "statistics": dict(metric.stats())}
        for name, metric in _global.items()
    ]
    pathlib.Path(file_name).write_text(json.dumps(entries, indent=1), encoding="utf-8")


if os.environ.get("PT_HPU_METRICS_FILE"):
    atexit.register(metrics_dump, os.environ["PT_HPU_METRICS_FILE"], "process_exit")
