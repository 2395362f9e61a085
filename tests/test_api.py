"""The REST gateway on real PostgreSQL, Redis and S3: lists, and what is known of one timestep."""

import base64
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlalchemy.event import listen
from sqlalchemy.exc import InternalError
from sqlmodel import Session, col, update

from api.app import create_app
from api.deps import Services
from api.filters import TimestepQuery
from api.routes.experiments import cadence_of, gaps_in
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRule, ExpiryRules
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.tables import Timestep
from tests.events import NOON, announced, archived, failed, ingested, rejected, uploaded
from tests.gateway import pages, problem, record


def test_the_way_of_a_timestep(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event = announced(metadata={"objective": "20x"})
    path = f"/api/1/timesteps/{event.timestep_id}"
    problem(client.get(path), 404)
    record(engine, event_log, ingested(event))
    assert client.get(path).json()["state"] == "ingested"
    assert client.get("/api/1/exports").json() == {"count": 0, "data": [], "next": None}
    problem(client.get(f"{path}/download", follow_redirects=False), 404)

    record(engine, event_log, failed(event))
    assert client.get(path).json()["failure"]["reason"] == "the share is away"
    record(engine, event_log, uploaded(event))

    timestep = client.get(path).json()
    assert (timestep["state"], timestep["failure"]) == ("uploaded", None)
    assert timestep["announced"]["metadata"] == {"objective": "20x"}
    assert timestep["object"]["checks"] == ["It was read back."]
    assert [event["type"] for event in timestep["history"]] == [
        "timestep.ingested",
        "timestep.failed",
        "timestep.uploaded",
    ]
    (run,) = timestep["flow_runs"]
    assert (run["flow_run_id"], run["said"]) == (timestep["history"][1]["flow_run_id"], ["timestep.failed"])
    assert run["url"] is None
    export = client.get("/api/1/exports").json()["data"][0]
    assert (export["timestep_id"], export["key"]) == (str(event.timestep_id), event.key)
    assert event.key in export["url"]
    assert "Signature" in export["url"]
    redirect = client.get(f"{path}/download", follow_redirects=False)
    assert redirect.status_code == 307
    assert event.key in redirect.headers["location"]

    record(engine, event_log, archived(event.key))
    timestep = client.get(path).json()
    assert timestep["state"] == "archived"
    assert timestep["archives"][0]["path"] == "/tape/images/20261101_004/20261123.tar"
    assert timestep["history"][-1]["type"] == "timestep.archived"
    assert client.get("/api/1/exports").json()["count"] == 1


def test_a_timestep_without_an_object_is_not_looked_for_among_all_archived_events(
    settings: Settings, engine: Engine, event_log: EventLog
) -> None:
    event = announced()
    record(engine, event_log, ingested(event), failed(event), archived("images/nobody/knows/it.tar"))
    app, asked = create_app(settings), list[str]()
    listen(app.state.services.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    with TestClient(app) as client:
        timestep = client.get(f"/api/1/timesteps/{event.timestep_id}").json()
    assert [said["type"] for said in timestep["history"]] == ["timestep.ingested", "timestep.failed"]
    assert timestep["archives"] == []
    assert any("FROM timestep_event" in statement for statement in asked)
    assert not [statement for statement in asked if "key IS NULL" in statement]


@pytest.mark.parametrize(
    ("addresses", "url"),
    [
        ({"prefect_api_url": "http://prefect:4200/api"}, "http://prefect:4200/runs/flow-run/"),
        (
            {"prefect_api_url": "http://prefect:4200/api", "prefect_ui_url": "https://lab.example/prefect"},
            "https://lab.example/prefect/runs/flow-run/",
        ),
    ],
)
def test_flow_runs_have_their_page_in_prefect(
    settings: Settings, engine: Engine, event_log: EventLog, addresses: dict[str, str], url: str
) -> None:
    event = announced()
    record(engine, event_log, failed(event), failed(event, attempt=2))
    with TestClient(create_app(settings.model_copy(update=addresses))) as client:
        (run,) = client.get(f"/api/1/timesteps/{event.timestep_id}").json()["flow_runs"]
    assert run["said"] == ["timestep.failed"] * 2
    assert run["url"] == url + run["flow_run_id"]


def a_night(count: int) -> list[ImagingEvent]:
    """Timesteps of two experiments and positions, some at the same instant."""
    return [
        announced(
            timestamp=NOON + timedelta(minutes=10 * (number // 3)),
            experiment_id=f"20261101_00{number % 2}",
            position=number % 2,
            event_type="video" if number % 5 == 0 else "stitch",
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("path", ["exports", "timesteps"])
def test_pages_give_every_timestep_once_newest_first(
    client: TestClient, engine: Engine, event_log: EventLog, path: str
) -> None:
    events = a_night(23)
    record(engine, event_log, *map(uploaded, events))
    found = pages(client, f"/api/1/{path}", limit=5)
    assert [len(page) for page in found] == [5, 5, 5, 5, 3]
    rows = [row for page in found for row in page]
    assert {row["timestep_id"] for row in rows} == {str(event.timestep_id) for event in events}
    times = [row["timestamp"] for row in rows]
    assert times == sorted(times, reverse=True)


def test_what_is_added_meanwhile_moves_no_page(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    record(engine, event_log, *map(uploaded, a_night(6)))
    first = client.get("/api/1/timesteps", params={"limit": 3}).json()
    before = client.get("/api/1/timesteps", params={"limit": 3, "cursor": first["next"]}).json()
    record(engine, event_log, uploaded(announced(timestamp=NOON + timedelta(days=1))))
    after = client.get("/api/1/timesteps", params={"limit": 3, "cursor": first["next"]}).json()
    assert after["data"] == before["data"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"system": "prince"}, 10),
        ({"system": "nobody"}, 0),
        ({"experiment": "20261101_001"}, 5),
        ({"experiment": "20261101_001", "position": 0}, 0),
        ({"position": 1}, 5),
        ({"type": "video"}, 2),
        ({"state": "uploaded"}, 10),
        ({"state": "failed"}, 1),
        ({"start": "2026-11-23T12:10:00Z", "end": "2026-11-23T12:20:00+00:00"}, 3),
        ({"start": "2026-11-23T13:10:00+01:00", "end": "2026-11-23T12:20:00"}, 3),
        ({"end": "2026-11-23T12:00:00"}, 1),
        ({}, 11),
    ],
)
def test_lists_are_narrowed_down(
    client: TestClient, engine: Engine, event_log: EventLog, query: dict[str, Any], expected: int
) -> None:
    record(engine, event_log, *map(uploaded, a_night(10)))
    record(
        engine,
        event_log,
        failed(announced(experiment_id="other", position=5, timestamp=NOON - timedelta(days=9))).model_copy(
            update={"system": "aretha"}
        ),
    )
    answer = client.get("/api/1/timesteps", params=query).json()
    assert answer["count"] == len(answer["data"]) == expected


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 501},
        {"limit": 10**40},
        {"limit": "many"},
        {"cursor": "rubbish"},
        {"cursor": "AAAA"},
        {"cursor": "W10"},  # []
        {"cursor": "x" * 5000},
        {"cursor": "bnVsbA"},  # null
        {"state": "lost"},
        {"type": "video'; drop table timestep; --"},
        {"position": -1},
        {"position": 10**30},
        {"start": "yesterday"},
        {"start": "0"},
        {"end": "1e9"},
        {"start": "0001-01-01T00:00:00+14:00"},
        {"system": "a\0b"},
        {"system": ""},
        {"unknown": "1"},
    ],
)
def test_a_query_that_makes_no_sense_is_refused(client: TestClient, query: dict[str, Any]) -> None:
    for path in ("timesteps", "exports", "experiments", "archives", "rejected"):
        problem(client.get(f"/api/1/{path}", params=query), 422)


def test_a_cursor_belongs_to_its_query(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    record(engine, event_log, *map(uploaded, a_night(6)))
    cursor = client.get("/api/1/timesteps", params={"limit": 2}).json()["next"]
    assert client.get("/api/1/timesteps", params={"limit": 3, "cursor": cursor}).status_code == 200
    for path, query in (("timesteps", {"system": "prince"}), ("exports", {}), ("rejected", {}), ("archives", {})):
        assert "another query" in problem(client.get(f"/api/1/{path}", params={**query, "cursor": cursor}), 422)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("timesteps", ["0001-01-01T00:00:00+14:00", str(UUID(int=1))]),
        ("timesteps", ["2026-11-23T12:00:00Z"]),
        ("timesteps", ["2026-11-23T12:00:00Z", str(UUID(int=1)), 1]),
        ("timesteps", [0, str(UUID(int=1))]),
        ("timesteps", ["2026-11-23T12:00:00Z", "' or 1=1 --"]),
        ("timesteps", {"timestamp": 1}),
        ("exports", [10**400, str(UUID(int=1))]),
        ("rejected", [None, None]),
        ("archives", [["2026-11-23T12:00:00Z"], str(UUID(int=1))]),
        ("experiments", ["nul\0"]),
        ("experiments", ["half a pair \ud800"]),
        ("experiments", [1]),
    ],
)
def test_a_forged_cursor_is_refused(client: TestClient, path: str, values: object) -> None:
    """Even one that names the right query, which anybody can compute."""
    scope = TimestepQuery(limit=100, cursor=None).scope(path)
    content = [scope, *values] if isinstance(values, list) else values
    cursor = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    problem(client.get(f"/api/1/{path}", params={"cursor": cursor}), 422)


def test_a_query_of_very_many_parameters_is_refused_at_once(client: TestClient) -> None:
    begin = time.monotonic()
    query = "&".join(f"a{number}=1" for number in range(8000))
    assert len(problem(client.get(f"/api/1/timesteps?{query}"), 422)) < 100
    assert time.monotonic() - begin < 2


def test_counting_has_an_end(
    client: TestClient, engine: Engine, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.paging.COUNT_LIMIT", 3)
    record(engine, event_log, *map(uploaded, a_night(3)))
    start = {"start": "2026-01-01T00:00:00Z", "limit": 2}
    assert client.get("/api/1/timesteps", params=start).json()["count"] == 3
    record(engine, event_log, *map(uploaded, a_night(1)))
    assert client.get("/api/1/timesteps", params=start).json()["count"] is None
    assert client.get("/api/1/timesteps", params={"limit": 2}).json()["count"] == 4


@pytest.mark.parametrize("path", ["timesteps/not-a-uuid", "archives/42", f"timesteps/{'9' * 500}/images"])
def test_ids_that_are_none_are_refused(client: TestClient, path: str) -> None:
    problem(client.get(f"/api/1/{path}"), 422)


@pytest.mark.parametrize(
    "path",
    ["nothing", f"timesteps/{UUID(int=1)}/images", f"archives/{UUID(int=1)}", "experiments/none", "../../etc/passwd"],
)
def test_what_does_not_exist_is_not_found(client: TestClient, path: str) -> None:
    problem(client.get(f"/api/1/{path}"), 404)


def test_rejected_files_are_listed_until_they_are_taken_in(
    client: TestClient, engine: Engine, event_log: EventLog
) -> None:
    record(engine, event_log, *(rejected(f"events/{number}.json") for number in range(5)))
    found = pages(client, "/api/1/rejected", limit=2)
    assert [[row["event_file"] for row in page] for page in found] == [
        ["events/4.json", "events/3.json"],
        ["events/2.json", "events/1.json"],
        ["events/0.json"],
    ]
    assert found[0][0]["reason"] == "it is not JSON"
    record(engine, event_log, ingested(announced(), event_file="events/3.json"))
    assert client.get("/api/1/rejected").json()["count"] == 4
    assert client.get("/api/1/rejected", params={"system": "aretha"}).json()["count"] == 0


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"system": "prince"}, {"unreadable", "again"}),
        ({"experiment": "20261101_004"}, {"again"}),
        ({"position": 3}, {"missing"}),
        ({"type": "video"}, {"missing"}),
        ({"state": "uploaded"}, {"again"}),
        ({"state": "failed"}, set()),
        ({"system": "aretha", "type": "video", "position": 3, "experiment": "other"}, {"missing"}),
        ({"end": "2026-11-23T12:00:00Z"}, set()),
        ({}, {"unreadable", "again", "missing"}),
    ],
)
def test_rejected_files_are_narrowed_down_by_what_they_announce(
    client: TestClient, engine: Engine, event_log: EventLog, query: dict[str, Any], expected: set[str]
) -> None:
    again, missing = announced(), announced(event_type="video", position=3, experiment_id="other")
    record(
        engine,
        event_log,
        uploaded(again),
        rejected("unreadable"),
        rejected("again", "it was announced before with other content", event=again),
        rejected("missing", "1 of 2 images are there", "aretha", event=missing),
    )
    rows = {row["event_file"]: row for row in client.get("/api/1/rejected", params=query).json()["data"]}
    assert rows.keys() == expected
    if not query:
        announces = ("timestep_id", "experiment_id", "position", "type", "timestamp", "state")
        assert [rows["unreadable"][name] for name in announces] == [None] * 6
        assert [rows["missing"][name] for name in announces] == [
            *(str(missing.timestep_id), "other", 3, "video", "2026-11-23T12:00:00Z", None)
        ]
        assert rows["again"]["state"] == "uploaded"


def test_archives_and_their_members(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event, other = announced(experiment_id="here"), announced(experiment_id="there")
    record(
        engine,
        event_log,
        uploaded(event),
        archived(event.key, "/tape/1.tar"),
        archived("images/no/such.tar", "/tape/1.tar"),
        uploaded(other),
        archived(other.key, "/tape/2.tar"),
    )
    assert [row["path"] for row in client.get("/api/1/archives").json()["data"]] == ["/tape/2.tar", "/tape/1.tar"]
    (row,) = client.get("/api/1/archives", params={"experiment": "here"}).json()["data"]
    archive = client.get(f"/api/1/archives/{row['archive_id']}").json()
    assert archive["path"] == "/tape/1.tar"
    assert {member["key"]: member["timestep_id"] for member in archive["members"]} == {
        event.key: str(event.timestep_id),
        "images/no/such.tar": None,
    }


def test_archives_are_narrowed_down_to_those_that_hold_such_a_timestep(
    client: TestClient, engine: Engine, event_log: EventLog
) -> None:
    night = a_night(12)
    videos = [announced(event_type="video", position=9, timestamp=NOON + timedelta(days=1)) for _ in range(2)]
    archives = {f"/tape/{number}.tar": night[number::4] for number in range(3)} | {"/tape/videos.tar": videos}
    holding = [archived(event.key, path) for path, events in archives.items() for event in events]
    record(
        engine,
        event_log,
        *(uploaded(event, system="aretha" if event.position else "prince") for event in night),
        # On tape before anybody knows of their upload, and one that never gets known.
        *holding,
        archived("images/no/such.tar", "/tape/unknown.tar"),
        *(uploaded(event, system="ella") for event in videos),
        failed(announced(position=3)),
        # Removed, and uploaded again with other bytes: the archive still holds its key.
        uploaded(night[1], system="aretha", etag="another", sha256="ab" * 32),
    )
    at = sorted(event.timestamp.isoformat() for event in night)
    queries: tuple[dict[str, Any], ...] = (
        *({"system": system} for system in ("prince", "aretha", "ella", "miles")),
        *({"experiment": experiment} for experiment in ("20261101_004", "other")),
        *({"state": state} for state in ("ingested", "uploaded", "archived", "failed")),
        *({"type": type} for type in ("stitch", "video", "overview")),
        *({"position": position} for position in (0, 1, 3, 9, 99)),
        {"start": at[5]},
        {"end": at[1]},
        {"start": at[2], "end": at[3]},
        {"start": at[-1], "end": at[0]},
        {"system": "aretha", "position": 0},
        {"system": "aretha", "state": "uploaded", "type": "stitch"},
        {"experiment": "20261101_004", "position": 9, "state": "archived", "start": at[0], "end": "2026-12-01"},
    )
    for query in queries:
        timesteps = client.get("/api/1/timesteps", params={**query, "limit": 500}).json()["data"]
        keys = {timestep["key"] for timestep in timesteps}
        expected = {path for path, events in archives.items() if keys & {event.key for event in events}}
        found = client.get("/api/1/archives", params=query).json()
        assert {row["path"] for row in found["data"]} == expected, query
        assert found["count"] == len(expected)
        assert [row for page in pages(client, "/api/1/archives", limit=1, **query) for row in page] == found["data"]


def test_an_experiment_shows_its_gaps(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    events = [
        announced(experiment_id="20261101_004", position=position, timestamp=NOON + timedelta(minutes=30 * number))
        for position, numbers in ((1, range(8)), (2, (0, 1, 2, 5, 6, 7)), (3, (0, 1, 2, 3)))
        for number in numbers
    ]
    record(engine, event_log, *map(uploaded, events[:-1]), ingested(events[-1]))
    (summary,) = client.get("/api/1/experiments").json()["data"]
    experiment = client.get("/api/1/experiments/20261101_004").json()
    assert summary.items() <= experiment.items()
    assert (experiment["timesteps"], experiment["positions"], experiment["systems"]) == (18, 3, ["prince"])
    assert experiment["states"] == {"ingested": 1, "uploaded": 17, "archived": 0, "failed": 0}
    whole, broken, stopped = experiment["coverage"]
    assert (whole["gaps"], whole["cadence_seconds"]) == ([], 1800)
    assert [(gap["after"], gap["before"], gap["missing"]) for gap in broken["gaps"]] == [
        ("2026-11-23T13:00:00Z", "2026-11-23T14:30:00Z", 2)
    ]
    assert [(gap["after"], gap["before"], gap["missing"]) for gap in stopped["gaps"]] == [
        ("2026-11-23T13:30:00Z", None, 4)
    ]


def test_two_timesteps_tell_no_cadence() -> None:
    times = [NOON, NOON + timedelta(hours=1)]
    assert cadence_of(times) is None
    assert gaps_in(times, NOON + timedelta(days=1)) == []


def test_experiments_come_in_pages(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    record(engine, event_log, *(ingested(announced(experiment_id=f"2026110{number}_001")) for number in range(5)))
    found = pages(client, "/api/1/experiments", limit=2)
    assert [[row["experiment_id"][:8] for row in page] for page in found] == [
        ["20261104", "20261103"],
        ["20261102", "20261101"],
        ["20261100"],
    ]


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"system": "aretha"},
        {"type": "video"},
        {"experiment": "20261101_001"},
        {"state": "failed"},
        {"position": 1},
        {"position": 7},
        {"start": "2026-11-23T12:20:00Z"},
        {"end": "2026-11-23T12:20:00Z", "system": "prince", "type": "stitch"},
        {"state": "uploaded"},
        {"state": "ingested", "system": "prince"},
        {"state": "uploaded", "start": "2026-11-23T12:20:00Z", "end": "2026-11-23T14:00:00Z"},
        {"state": "uploaded", "position": 1, "end": "2026-11-23T12:20:00Z"},
    ],
)
def test_experiments_say_what_their_timesteps_say(
    client: TestClient, engine: Engine, event_log: EventLog, query: dict[str, Any]
) -> None:
    events = a_night(11)
    record(engine, event_log, *(uploaded(event, system="aretha" if event.position else "prince") for event in events))
    record(engine, event_log, failed(announced(experiment_id="other", timestamp=NOON + timedelta(hours=1))))
    record(engine, event_log, ingested(announced(position=5, timestamp=NOON + timedelta(hours=2))))
    timesteps = client.get("/api/1/timesteps", params={**query, "limit": 500}).json()["data"]
    found = client.get("/api/1/experiments", params=query).json()
    assert found["count"] == len(found["data"])
    assert [row["experiment_id"] for row in found["data"]] == sorted(
        {timestep["experiment_id"] for timestep in timesteps}, reverse=True
    )
    for row in found["data"]:
        of_it = [timestep for timestep in timesteps if timestep["experiment_id"] == row["experiment_id"]]
        assert row == {
            "experiment_id": row["experiment_id"],
            "systems": sorted({timestep["system"] for timestep in of_it}),
            "timesteps": len(of_it),
            "positions": len({timestep["position"] for timestep in of_it}),
            "images": sum(timestep["image_count"] for timestep in of_it),
            "bytes": sum(timestep["size"] or 0 for timestep in of_it),
            "states": {state: sum(timestep["state"] == state for timestep in of_it) for state in row["states"]},
            "first": min(timestep["timestamp"] for timestep in of_it),
            "last": max(timestep["timestamp"] for timestep in of_it),
        }


def test_days_begin_where_the_time_zone_says(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    late = announced(timestamp=datetime(2026, 11, 23, 23, 30, tzinfo=UTC))
    record(engine, event_log, uploaded(late), ingested(announced()))
    days = {"first": "2026-11-20", "last": "2026-11-24"}
    utc = client.get("/api/1/stats/daily", params=days).json()
    assert [(row["day"], row["timesteps"], row["bytes"]) for row in utc["data"]] == [("2026-11-23", 2, 20480)]
    there = client.get("/api/1/stats/daily", params={**days, "time_zone": "Europe/Amsterdam"}).json()
    assert [(row["day"], row["states"]["uploaded"]) for row in there["data"]] == [("2026-11-23", 0), ("2026-11-24", 1)]


@pytest.mark.parametrize(
    "query",
    [
        {"time_zone": "Mars/Olympus"},
        {"time_zone": "../../etc/passwd"},
        {"first": "2026-01-02", "last": "2026-01-01"},
        {"first": "2020-01-01", "last": "2026-01-01"},
        {"last": "9999-12-31"},
        {"last": "0"},
        {"last": "0001-01-01"},
    ],
)
def test_days_that_make_no_sense_are_refused(client: TestClient, query: dict[str, str]) -> None:
    problem(client.get("/api/1/stats/daily", params=query), 422)


def test_what_is_not_on_tape_for_too_long_is_at_risk(
    client: TestClient, settings: Settings, engine: Engine, event_log: EventLog, object_store: ObjectStore
) -> None:
    events = [announced(UUID(int=number << 96)) for number in range(1, 5)]
    here = [uploaded(event, bucket=settings.bucket) for event in events]
    record(engine, event_log, *here, archived(events[0].key))
    with Session(engine) as session, session.begin():
        for number, event in enumerate(events):
            at = datetime.now(UTC) - timedelta(days=5 - number)
            session.execute(update(Timestep).where(col(Timestep.id) == event.timestep_id).values(uploaded_at=at))
    found = [row for page in pages(client, "/api/1/at-risk", limit=1, hours=50) for row in page]
    assert [row["timestep_id"] for row in found] == [str(events[1].timestep_id), str(events[2].timestep_id)]
    assert [row["days_left"] for row in found] == [None, None]

    object_store.client.put_bucket_lifecycle_configuration(
        Bucket=object_store.bucket_name,
        LifecycleConfiguration={
            "Rules": [
                {"ID": "all", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}},
                {"ID": "off", "Status": "Disabled", "Filter": {"Prefix": "images/"}, "Expiration": {"Days": 1}},
                {"ID": "videos", "Status": "Enabled", "Filter": {"Prefix": "videos/"}, "Expiration": {"Days": 7}},
                {
                    "ID": "archived",
                    "Status": "Enabled",
                    "Filter": {"Tag": {"Key": "archived", "Value": "true"}},
                    "Expiration": {"Days": 2},
                },
            ]
        },
    )
    assert ExpiryRules(object_store).read() == [ExpiryRule("", 30), ExpiryRule("videos/", 7)]
    # What was read of the rules is remembered for a minute.
    with TestClient(create_app(settings)) as another:
        (first, *_) = another.get("/api/1/at-risk").json()["data"]
    assert first["days_left"] == pytest.approx(26, abs=0.02)


def test_an_object_in_a_former_bucket_is_deleted_by_the_rules_of_that_one(
    client: TestClient, settings: Settings, engine: Engine, event_log: EventLog, object_store: ObjectStore
) -> None:
    former = object_store.of_bucket(f"{settings.bucket}-former")
    former.ensure_bucket()
    for store, days in ((object_store, 30), (former, 10)):
        rule = {"ID": "all", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": days}}
        store.client.put_bucket_lifecycle_configuration(
            Bucket=store.bucket_name,
            LifecycleConfiguration={"Rules": [rule]},  # type: ignore[list-item]
        )
        event = announced()
        record(engine, event_log, uploaded(event, bucket=store.bucket_name))
        at = datetime.now(UTC) - timedelta(days=days / 10)
        with Session(engine) as session, session.begin():
            session.execute(update(Timestep).where(col(Timestep.id) == event.timestep_id).values(uploaded_at=at))
    found = client.get("/api/1/at-risk", params={"hours": 1}).json()["data"]
    assert [row["days_left"] for row in found] == [pytest.approx(27, abs=0.02), pytest.approx(9, abs=0.02)]


def test_the_gateway_can_not_write_the_database(settings: Settings, engine: Engine, event_log: EventLog) -> None:
    record(engine, event_log, ingested(announced()))
    services = Services.from_settings(settings)
    with Session(services.engine) as session, pytest.raises(InternalError, match="read-only"):
        session.execute(update(Timestep).values(system="other"))
    services.close()
