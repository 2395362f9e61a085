"""How the whole system does, for people and for Prometheus."""

import math
from collections.abc import Iterator

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.deps import ServicesDep
from api.overview import GroupStatus, RedisStatus, StateStatus, Status, read_status
from api.warnings import DiskRow, FlightCheckRow

router = APIRouter(tags=["operating"])
metrics_router = APIRouter(tags=["operating"])


@router.get("/status", summary="How the whole system does")
def status(services: ServicesDep) -> Status:
    """What waits, what failed, what is set aside and why. What `archiver status` shows."""
    return read_status(services)


@metrics_router.get(
    "/metrics",
    summary="The same for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "In Prometheus' text format.",
            "content": {"text/plain": {"example": 'archiver_timesteps{state="failed"} 0.0'}},
        }
    },
)
def metrics(services: ServicesDep) -> Response:
    """A part that can't be asked has no figures, and `archiver_reachable` is 0 for it."""
    registry = CollectorRegistry()
    registry.register(_Figures(read_status(services)))
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Figures(Collector):
    """A status as metrics."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        reachable = GaugeMetricFamily("archiver_reachable", "Whether it can be asked.", labels=["service"])
        reachable.add_metric(["database"], self._status.state is not None)
        reachable.add_metric(["stream"], self._status.groups is not None)
        yield reachable
        if self._status.state:
            yield from _of_state(self._status.state)
        if self._status.groups is not None:
            yield from _of_groups(self._status.groups)
        if self._status.redis:
            yield from _of_redis(self._status.redis)
        yield GaugeMetricFamily(
            "archiver_waiting_event_files",
            "Event files that are neither taken in nor rejected.",
            self._status.event_files_waiting,
        )
        oldest = GaugeMetricFamily(
            "archiver_oldest_event_file_seconds", "For how long the oldest of them waits.", labels=["system"]
        )
        for system, seconds in self._status.oldest_event_file_seconds.items():
            oldest.add_metric([system], seconds)
        yield oldest


def _of_state(state: StateStatus) -> Iterator[Metric]:
    timesteps = GaugeMetricFamily("archiver_timesteps", "Timesteps in each state.", labels=["state"])
    for name, count in state.timesteps.items():
        timesteps.add_metric([name.value], count)
    yield timesteps
    events = CounterMetricFamily("archiver_events", "Events recorded, by type.", labels=["type"])
    for type, count in state.events.items():
        events.add_metric([type], count)
    yield events
    yield GaugeMetricFamily("archiver_stored_bytes", "Bytes of all objects.", state.bytes)
    yield GaugeMetricFamily("archiver_rejected_event_files", "Event files that can't be taken in.", state.rejected)
    yield GaugeMetricFamily("archiver_at_risk_timesteps", "Not on tape for too long.", state.at_risk)
    yield GaugeMetricFamily(
        "archiver_oldest_not_on_tape_seconds",
        "Since the upload that waits longest for the tape; 0 when none does.",
        state.oldest_not_on_tape_seconds or 0,
    )
    silent = GaugeMetricFamily(
        "archiver_system_last_timestep_seconds", "When a system that fell silent took its last one.", labels=["system"]
    )
    for system in state.silent_systems:
        silent.add_metric([system.system], system.last.timestamp())
    yield silent
    yield GaugeMetricFamily("archiver_silent_systems", "Systems that fell silent.", len(state.silent_systems))
    yield GaugeMetricFamily(
        "archiver_filling_disks",
        "Disks that will be full soon, or before uploads catch up.",
        sum(disk.is_filling for disk in state.disks),
    )
    yield GaugeMetricFamily(
        "archiver_unreached_timesteps",
        "Timesteps that wait and whose system no upload-worker reaches.",
        sum(state.unreached.values()),
    )
    yield GaugeMetricFamily(
        "archiver_expiring_objects", "Objects not on tape that the bucket deletes within three days.", state.expiring
    )
    yield from _of_flight_check(state.flight_check)
    yield GaugeMetricFamily(
        "archiver_audit_differences", "What the last audits found and did not mend.", state.audit_differences
    )
    yield GaugeMetricFamily(
        "archiver_systems_without_room", "Systems that wait for room in staging.", len(state.waiting_for_room)
    )
    yield from _of_disks(state.disks)


def _of_flight_check(last: FlightCheckRow | None) -> Iterator[Metric]:
    has_failed = last is not None and last.verdict == "failed"
    yield GaugeMetricFamily("archiver_flight_check_failed", "Whether the last flight check failed.", has_failed)
    good = last.last_good.timestamp() if last and last.last_good else 0
    yield GaugeMetricFamily("archiver_flight_check_last_good_seconds", "When the last good one ended, or 0.", good)


def _of_disks(disks: list[DiskRow]) -> Iterator[Metric]:
    about = {
        "free_bytes": "Bytes free on the disk.",
        "bytes_in_per_hour": "Bytes that come in an hour, as of the last day.",
        "bytes_out_per_hour": "Bytes that are deleted in an hour, as of the last day.",
        "hours_left": "Until the disk is full; infinite where no more comes than goes.",
    }
    for name, text in about.items():
        metric = GaugeMetricFamily(f"archiver_disk_{name}", text, labels=["directory"])
        for disk in disks:
            value = getattr(disk, name)
            metric.add_metric([disk.directory], math.inf if value is None else value)
        yield metric


def _of_redis(redis: RedisStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily("archiver_redis_used_bytes", "Bytes that Redis holds in memory.", redis.used_bytes)
    limit = math.inf if redis.limit_bytes is None else redis.limit_bytes
    yield GaugeMetricFamily("archiver_redis_limit_bytes", "With so many, it refuses to be told more.", limit)


def _of_groups(groups: list[GroupStatus]) -> Iterator[Metric]:
    about = {
        "waiting": "Entries of the stream that the group has not taken.",
        "in_progress": "Entries that the group has taken and not finished.",
        "dead_letters": "Entries that the group has set aside.",
        "oldest_waiting_seconds": "Age of the oldest entry that the group has not finished; 0 when there is none.",
    }
    for name, text in about.items():
        metric = GaugeMetricFamily(f"archiver_group_{name}", text, labels=["group"])
        for group in groups:
            metric.add_metric([group.group], getattr(group, name) or 0)
        yield metric
