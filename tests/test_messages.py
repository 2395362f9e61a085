"""The language of the system: what a microscope may write, and what becomes of it."""

import json
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, cast
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blocks.event_file import MAX_EVENT_FILE_BYTES, ImagingEvent, InvalidEventFile, parse_event_file
from blocks.event_log import Entry
from blocks.messages import Ingested, LogEvent

AMSTERDAM = ZoneInfo("Europe/Amsterdam")
ZONES = [
    ZoneInfo(name) for name in ("UTC", "Europe/Amsterdam", "America/St_Johns", "Pacific/Chatham", "Africa/Monrovia")
]
EVENT: dict[str, Any] = {
    "timestep_id": "0f3a5c1e-7c54-4d0a-9d0b-3f4c1f6f7a11",
    "plate": 4,
    "cross_date": "2026-11-01",
    "position": 7,
    "timestamp": "2026-11-23T10:42:07Z",
    "img_count": 2,
    "img_dir": "20261101_004/t0001",
}

# However slow the machine.
property_of = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

text = st.text(max_size=20)
numbers = st.integers(0, 2**31 - 1)
directory_names = text.filter(lambda name: name not in ("", ".", "..") and not {"/", "\0"} & set(name))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)
timestamps = st.datetimes(datetime(1970, 1, 2), datetime(2999, 12, 30), timezones=st.none() | st.sampled_from(ZONES))


def zoned(stamp: datetime) -> bool:
    """Whether ISO 8601 can say the offset: up to 1972 there were some with seconds."""
    return stamp.tzinfo is None or not (stamp.utcoffset() or timedelta()) % timedelta(minutes=1)


@st.composite
def event_files(draw: st.DrawFn) -> dict[str, Any]:
    """What a microscope may write, with its optional, aliased and unknown fields."""
    count, directory = draw(st.sampled_from(["img_count", "image_count"])), draw(st.sampled_from(["img_dir", "path"]))
    known = {
        "timestep_id": str(draw(st.uuids())),
        "plate": draw(numbers),
        "cross_date": draw(st.dates(date(1970, 1, 1), date(2999, 12, 31))).isoformat(),
        "position": draw(numbers),
        "timestamp": draw(timestamps.filter(zoned)).isoformat(),
        count: draw(numbers.filter(bool)),
        directory: "/".join(draw(st.lists(directory_names, min_size=1, max_size=3))),
    }
    optional = st.fixed_dictionaries(
        {},
        optional={
            "experiment_id": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True),
            "event_type": st.sampled_from(["stitch", "video", "overview"]),
            "metadata": st.dictionaries(text, values, max_size=3),
        },
    )
    ours = set(ImagingEvent.model_fields) | {"image_count", "path"}
    unknown = st.dictionaries(text | st.sampled_from(["key", "document", "model_config"]), values, max_size=3)
    return {**{name: value for name, value in draw(unknown).items() if name not in ours}, **known, **draw(optional)}


def parsed(document: dict[str, Any], zone: ZoneInfo = AMSTERDAM, **changes: Any) -> ImagingEvent:
    return parse_event_file(json.dumps(document | changes).encode(), zone)


def logged(event: ImagingEvent, system: str = "prince", event_file: str = "events/1.json") -> LogEvent:
    ingested = Ingested(timestep_id=event.timestep_id, system=system, event_file=event_file, event=event)
    return LogEvent.of(ingested, "test")


def through_the_stream(event: LogEvent) -> LogEvent:
    return Entry("1-0", {"event": event.model_dump_json()}).decode()


@property_of
@given(event_files(), st.sampled_from(ZONES[:4]))
@example(EVENT | {"timestamp": "2026-10-25T02:30:00"}, AMSTERDAM)  # this hour is there twice
@example(EVENT | {"timestamp": "2026-03-29T02:30:00"}, AMSTERDAM)  # and this one never
@example(EVENT | {"n": 10**400, "x": {"a": [{}] * 50}, "\0": "\0"}, AMSTERDAM)
def test_an_event_survives_the_stream_unchanged(document: dict[str, Any], zone: ZoneInfo) -> None:
    event = parsed(document, zone)
    entry = logged(event)
    received = through_the_stream(entry)
    assert received == entry
    assert isinstance(received.data, Ingested)
    assert received.data.event.key == event.key
    assert received.data.digest == Ingested.model_validate(entry.data.model_dump()).digest


def test_the_priority_of_its_system_makes_no_other_event_of_a_timestep() -> None:
    first = cast(Ingested, logged(parsed(EVENT)).data)
    urgent = first.model_copy(update={"priority": 5})
    assert urgent.digest == first.digest
    assert LogEvent.of(urgent, "test").id == LogEvent.of(first, "test").id
    received = cast(Ingested, through_the_stream(LogEvent.of(urgent, "test")).data)
    assert (first.priority, received.priority) == (0, 5)


@property_of
@given(event_files(), st.sampled_from(ZONES[:4]))
def test_nothing_a_microscope_wrote_is_dropped_or_altered(document: dict[str, Any], zone: ZoneInfo) -> None:
    said = parsed(document, zone).document()
    aliases = {"image_count": "img_count", "path": "img_dir"}
    written = {aliases.get(name, name): value for name, value in document.items()}
    stamp, wrote = datetime.fromisoformat(said.pop("timestamp")), datetime.fromisoformat(written.pop("timestamp"))
    assert stamp.replace(tzinfo=None) == wrote.replace(tzinfo=None)
    assert stamp.utcoffset() == (wrote if wrote.tzinfo else wrote.replace(tzinfo=zone)).utcoffset()
    assert {name: said[name] for name in written} == written
    assert said.keys() - written.keys() <= {"experiment_id", "event_type", "metadata"}


@property_of
@given(event_files(), st.sampled_from(ZONES[:4]))
def test_surf_archiver_finds_every_key_under_its_utc_day(document: dict[str, Any], zone: ZoneInfo) -> None:
    event = parsed(document, zone)
    kind, experiment, day, name = event.key.split("/")
    assert any(fnmatchcase(event.key, f"{prefix}/*/*/*.tar") for prefix in ("images", "videos", "overview"))
    assert kind == {"stitch": "images", "video": "videos", "overview": "overview"}[event.event_type]
    assert experiment == event.experiment_id
    assert f"{day}{name[:6]}" == f"{event.timestamp.astimezone(UTC):%Y%m%d%H%M%S}"


@property_of
@given(event_files(), st.uuids(), st.uuids())
def test_two_timesteps_never_share_a_key(document: dict[str, Any], one: UUID, other: UUID) -> None:
    keys = {parsed(document, timestep_id=str(id)).key for id in (one, other)}
    assert len(keys) == (1 if one.hex[:8] == other.hex[:8] else 2)


@property_of
@given(event_files(), st.data())
def test_the_same_event_has_one_id_and_another_event_another(document: dict[str, Any], data: st.DataObject) -> None:
    event = parsed(document)
    shuffled = dict(data.draw(st.permutations(list(document.items()))))
    again = logged(parse_event_file(json.dumps(shuffled, indent=3).encode(), AMSTERDAM), event_file="events/2.json")
    assert again.id == logged(event).id
    changed = event.model_copy(update={"position": event.position + 1})
    others = [logged(changed), logged(event, system="aretha"), logged(parsed(document, timestep_id=str(uuid4())))]
    assert len({again.id, *(other.id for other in others)}) == 4


@pytest.mark.parametrize(
    ("timestamp", "path"),
    [
        ("2026-11-23T00:30:00+01:00", "20261122/233000"),
        ("2026-11-23T00:30:00", "20261122/233000"),  # winter in Amsterdam
        ("2026-07-01T00:30:00", "20260630/223000"),  # summer
        ("2026-10-25T02:30:00", "20261025/003000"),  # of the two, the first
        ("2026-12-31T23:59:59.999999-12:00", "20270101/115959"),
        ("2026-11-23 10:42Z", "20261123/104200"),
    ],
)
def test_the_key_is_in_utc(timestamp: str, path: str) -> None:
    assert parsed(EVENT, timestamp=timestamp).key == f"images/20261101_004/{path}_0f3a5c1e.tar"


def test_defaults() -> None:
    event = parsed(EVENT, plate=12, experiment_id=None)
    assert (event.experiment_id, event.event_type, event.metadata) == ("20261101_012", "stitch", {})
    assert parsed(EVENT, plate=1234).experiment_id == "20261101_1234"


def wrong(**changes: Any) -> bytes:
    return json.dumps(EVENT | changes).encode()


def literally(name: str, literal: str) -> bytes:
    """An event file with a value that Python's JSON writer would not write."""
    return wrong(**{name: "HERE"}).replace(b'"HERE"', literal.encode())


SOUND = json.dumps(EVENT).encode()
PATHS = ["", ".", "..", "/", "/etc", "//x", "a/../b", "a\0", None, 7]
HOSTILE = {
    "nothing": b"",
    "white space": b" \n",
    "half": SOUND[:-20],
    "trailing": SOUND + b"}",
    "a list": b"[" + SOUND + b"]",
    "null": b"null",
    "not UTF-8": SOUND[:-1] + b', "x": "\xff"}',
    "half of UTF-16": SOUND.decode().encode("utf-16")[:-1],
    "a raw surrogate": SOUND[:-1] + b', "x": "\xed\xa0\x80"}',
    "a lone surrogate": wrong(x="\ud800"),
    "a lone surrogate as img_dir": wrong(img_dir="a\udfff"),
    "a lone surrogate as a name": wrong(metadata={"\ud800": 1}),
    "a surrogate twice": b'{"\\ud800": 1, "\\ud800": 2}',
    "a NUL twice": b'{"\\u0000": 1, "\\u0000": 2}',
    "a field twice": SOUND[:-1] + b', "plate": 5}',
    "a field twice, deep inside": SOUND[:-1] + b', "metadata": {"a": [{"b": 1, "b": 1}]}}',
    "NaN": literally("x", "NaN"),
    "Infinity": literally("plate", "Infinity"),
    "an infinite literal": literally("x", "-1e400"),
    "an infinite count": literally("img_count", "1e400"),
    "a number of 5000 digits": literally("x", "9" * 5000),
    "deeper than the stream": literally("x", "[" * 200 + "]" * 200),
    "deeper than pydantic": literally("x", '{"a":' * 300 + "1" + "}" * 300),
    "deeper than Python": literally("x", "[" * 60_000 + "]" * 60_000),
    "never closed": b"[" * 100_000,
    "10 MB": wrong(x="x" * 10_000_000),
    "a byte too long": SOUND + b" " * (MAX_EVENT_FILE_BYTES - len(SOUND) + 1),
    "id of another kind": wrong(timestep_id=7),
    "id cut off": wrong(timestep_id=EVENT["timestep_id"][:-1]),
    "negative plate": wrong(plate=-1),
    "negative position": wrong(position=-1),
    "no image": wrong(img_count=0),
    "fewer than no image": wrong(img_count=-3),
    "half a plate": wrong(plate=4.5),
    "a boolean plate": wrong(plate=True),
    "a boolean count": wrong(img_count=True),
    "a plate no column holds": wrong(plate=2**31),
    "a position no column holds": wrong(position=10**100),
    "timestamp as a number": wrong(timestamp=1795430527),
    "timestamp as a number in words": wrong(timestamp="1795430527"),
    "timestamp without its time": wrong(timestamp="2026-11-23"),
    "timestamp in the year 1": wrong(timestamp="0001-01-01T00:00:00"),
    "timestamp in the year 9999": wrong(timestamp="9999-12-31T23:59:59-12:00"),
    "timestamp on no day": wrong(timestamp="2026-02-30T00:00:00"),
    "timestamp in the hour 24": wrong(timestamp="2026-02-20T24:00:01"),
    "cross_date as a number": wrong(cross_date=86400),
    "cross_date as a number in words": wrong(cross_date="86400"),
    "cross_date in the year 1": wrong(cross_date="0001-01-01"),
    "cross_date in the year 9999": wrong(cross_date="9999-12-31"),
    "experiment without a name": wrong(experiment_id=""),
    "experiment elsewhere": wrong(experiment_id="../x"),
    "experiment of two parts": wrong(experiment_id="a/b"),
    "experiment with a line break": wrong(experiment_id="a\n"),
    "experiment as a number": wrong(experiment_id=4),
    "an endless experiment": wrong(experiment_id="x" * 129),
    "type of event": wrong(event_type="Stitch"),
    "metadata as a list": wrong(metadata=[]),
    "no metadata": wrong(metadata=None),
    "an endless img_dir": wrong(img_dir="é/" * 400),
    **{
        f"img_dir {path!r}": wrong(img_dir=path)
        for path in ("", ".", "..", "/", "/etc", "//x", "a/../b", "a\0", None, 7)
    },
    **{
        f"without {name}": json.dumps({other: EVENT[other] for other in EVENT if other != name}).encode()
        for name in EVENT
    },
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_event_file_is_refused_with_a_sentence(content: bytes) -> None:
    with pytest.raises(InvalidEventFile) as refused:
        parse_event_file(content, AMSTERDAM)
    sentence = str(refused.value)
    assert len(sentence) > 10
    sentence.encode()
    assert "\0" not in sentence  # PostgreSQL's text can't hold it


@property_of
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_any_other_bytes_are_refused_too(content: bytes) -> None:
    with pytest.raises(InvalidEventFile):
        parse_event_file(content, AMSTERDAM)


@property_of
@given(event_files(), st.sampled_from([*EVENT, "experiment_id", "event_type", "metadata"]), values)
def test_a_wrong_value_is_refused_or_harmless(document: dict[str, Any], name: str, value: Any) -> None:
    try:
        event = parsed(document | {name: value})
    except InvalidEventFile:
        return
    assert through_the_stream(logged(event)).data == logged(event).data


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_other_unicode_encodings_are_read(encoding: str) -> None:
    written = EVENT | {"metadata": {"operator": "Zoë"}}
    assert parse_event_file(json.dumps(written, ensure_ascii=False).encode(encoding), AMSTERDAM) == parsed(written)


def test_an_event_file_may_be_as_large_as_allowed() -> None:
    event = parse_event_file(SOUND + b" " * (MAX_EVENT_FILE_BYTES - len(SOUND)), AMSTERDAM)
    assert event == parsed(EVENT)
