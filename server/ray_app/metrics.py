"""What all replicas measure as one page of Prometheus' text: each sample with the name of its replica."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

LABEL = "replica"

Families = Sequence[Metric]


def merged(replicas: Iterable[tuple[str, Families]]) -> bytes:
    """The families of (replica, its families), in the order of the first that has one."""
    found: dict[str, Metric] = {}
    for replica, families in replicas:
        for family in families:
            whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
            whole.samples += [sample._replace(labels={**sample.labels, LABEL: replica}) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Given(found.values()))
    return generate_latest(registry)


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
