"""Uploads through a proxy that goes wrong, and past a gateway that dies."""

import threading
import time
from pathlib import Path

import pytest

from blocks.bundle import Bundle
from blocks.object_store import NotStored, ObjectStore, ObjectStoreError
from tests.conftest import make_store
from tests.faulty_proxy import Fault, FaultyProxy, FlipByte, LoseAnswer, Refuse, Reset, Stall, Truncate
from tests.images import KEY, SEVERAL_PARTS, TIMESTEP, make_images
from tests.rados_gateway import RadosGateway


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("timestep") / "source", SEVERAL_PARTS)


@pytest.fixture
def bundle(source: Path) -> Bundle:
    return Bundle.of(source, b"{}")


@pytest.fixture
def store(proxy: FaultyProxy) -> ObjectStore:
    return make_store(proxy.url)


@pytest.mark.parametrize(
    ("fault", "request_line"),
    [
        (Reset(), "partNumber=2"),
        (Refuse(500, "InternalError"), "partNumber=2"),
        (Refuse(503, "SlowDown", retry_after=1), "partNumber=2"),
        (Refuse(429, "TooManyRequests"), "partNumber=2"),
        (Truncate(0.15), "partNumber=2"),
        (LoseAnswer(), "partNumber=2"),
        (Stall(10), "partNumber=2"),
        (Refuse(503, "SlowDown"), "POST"),
        (LoseAnswer(), "?uploads"),
        (Truncate(0.9), "?uploads"),
        (LoseAnswer(), "POST /{bucket}/{key}?uploadId"),
        (Truncate(0.5), "POST /{bucket}/{key}?uploadId"),
        (Truncate(0.5), "HEAD /{bucket}/{key}"),
        (Refuse(503, "SlowDown"), "HEAD /{bucket}/{key}"),
    ],
    ids=str,
)
def test_an_upload_goes_on_after(
    fault: Fault, request_line: str, proxy: FaultyProxy, store: ObjectStore, bundle: Bundle
) -> None:
    line = request_line.format(bucket=store.bucket_name, key=KEY)
    proxy.plan(fault, line)

    stored = store.upload(bundle, KEY, TIMESTEP)

    assert len(proxy.seen(line)) >= 2, "the fault did not happen, or was not answered by trying again"
    assert store.verify(KEY, stored.images, stored.sha256) == []
    # Only what failed was sent again.
    parts = [request for request in proxy.requests if "partNumber=" in request.line]
    assert len(parts) <= 6


def test_a_small_upload_goes_on_after_a_lost_answer(proxy: FaultyProxy, store: ObjectStore, tmp_path: Path) -> None:
    proxy.plan(LoseAnswer(), f"PUT /{store.bucket_name}/{KEY}")
    stored = store.upload(Bundle.of(make_images(tmp_path / "source", [1000]), b"{}"), KEY, TIMESTEP)
    assert len(proxy.seen(f"PUT /{store.bucket_name}/{KEY}")) == 2
    assert store.verify(KEY, stored.images, stored.sha256) == []


def test_reading_goes_on_where_an_answer_broke_off(proxy: FaultyProxy, store: ObjectStore, bundle: Bundle) -> None:
    stored = store.upload(bundle, KEY, TIMESTEP)
    proxy.plan(Truncate(0.5), "GET", times=3)
    assert store.verify(KEY, stored.images, stored.sha256) == []
    assert len(proxy.seen("GET")) == 4


def test_patience_ends_and_says_why(proxy: FaultyProxy, store: ObjectStore, bundle: Bundle) -> None:
    proxy.plan(Refuse(503, "SlowDown"), "partNumber=3", times=1000)
    impatient = store.model_copy(update={"patience_seconds": 1.0})
    with pytest.raises(ObjectStoreError, match=rf"part 3 of {KEY}: gave up .* 503 SlowDown"):
        impatient.upload(bundle, KEY, TIMESTEP)
    assert store.head(KEY) is None
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket_name)


def test_a_byte_flipped_in_flight_is_refused_and_sent_again(rados_gateway: RadosGateway, bundle: Bundle) -> None:
    with FaultyProxy.before(rados_gateway.url) as proxy:
        store = make_store(proxy.url)
        proxy.plan(FlipByte(), "partNumber=2")
        stored = store.upload(bundle, KEY, TIMESTEP)
        refused, accepted = proxy.seen("partNumber=2")
        assert refused.answered == 400
        assert accepted.answered == 200
        assert store.verify(KEY, stored.images, stored.sha256) == []


def test_a_byte_that_the_store_lets_pass_is_found_by_its_md5(s3_endpoint: str, bundle: Bundle) -> None:
    # moto takes a signed payload at its word.
    with FaultyProxy.before(s3_endpoint) as proxy:
        store = make_store(proxy.url).model_copy(update={"check_md5": True})
        proxy.plan(FlipByte(), "partNumber=2")
        with pytest.raises(NotStored, match=rf"part 2 of {KEY} has the ETag [0-9a-f]{{32}}, the MD5 sum .* is"):
            store.upload(bundle, KEY, TIMESTEP)
        assert proxy.seen("partNumber=2")[0].answered == 200
        assert store.head(KEY) is None


def test_the_proof_says_where_the_md5_sums_come_from(any_s3: str, bundle: Bundle) -> None:
    given = make_store(any_s3)
    computed = given.model_copy(update={"check_md5": True})
    (check,) = [check for check in given.upload(bundle, "given", TIMESTEP).proof.checks if "MD5" in check]
    assert "the store gave for its parts" in check
    (check,) = [check for check in computed.upload(bundle, "computed", TIMESTEP).proof.checks if "MD5" in check]
    assert "computed here" in check


def test_it_works_over_tls(rados_gateway: RadosGateway, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(rados_gateway.certificate))
    store = make_store(rados_gateway.tls_url)
    stored = store.upload(bundle, KEY, TIMESTEP)
    assert store.verify(KEY, stored.images, stored.sha256) == []


def test_an_unknown_certificate_is_refused_at_once(rados_gateway: RadosGateway, bundle: Bundle) -> None:
    trusted = make_store(rados_gateway.url)
    parameters = trusted.credentials.aws_client_parameters.model_copy(update={"endpoint_url": rados_gateway.tls_url})
    credentials = trusted.credentials.model_copy(update={"aws_client_parameters": parameters})
    store = trusted.model_copy(update={"credentials": credentials})
    with pytest.raises(ObjectStoreError, match=r"certificate .* is not trusted"):
        store.upload(bundle, KEY, TIMESTEP)


def test_a_gateway_is_killed_and_comes_back(rados_gateway: RadosGateway, bundle: Bundle) -> None:
    store = make_store(rados_gateway.url).model_copy(update={"bytes_per_second": 10_000_000, "patience_seconds": 120.0})
    outcome: list[object] = []

    def upload() -> None:
        outcome.append(store.upload(bundle, KEY, TIMESTEP))

    thread = threading.Thread(target=upload)
    thread.start()
    time.sleep(1)  # about half of the two seconds that the rate limit makes of it
    rados_gateway.kill_gateway()
    try:
        time.sleep(1)
    finally:
        rados_gateway.start_gateway()
    thread.join(120)
    (stored,) = outcome
    assert store.verify(KEY, stored.images, stored.sha256) == []  # type: ignore[attr-defined]
