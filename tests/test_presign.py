"""URLs that carry their own permission are those that botocore makes."""

import time
from datetime import UTC, datetime
from urllib.parse import parse_qs, quote

import urllib3
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from blocks.object_store import ObjectStore
from blocks.presign import Presigner
from tests.conftest import make_store
from tests.rados_gateway import RadosGateway

KEYS = st.one_of(
    st.from_regex(r"images/20[0-9]{6}_[0-9]{3}/20[0-9]{6}/[0-9]{6}_[0-9a-f]{8}\.tar", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=50),
)
ENDPOINTS = st.sampled_from(
    ["http://127.0.0.1:8080", "https://s3.example.org", "https://s3.example.org:443", "http://s3.example.org:443"]
)


@given(key=KEYS, endpoint=ENDPOINTS, seconds=st.integers(1, 604_800), token=st.none() | st.just("t/o+k=n"))
def test_botocore_signs_the_same(key: str, endpoint: str, seconds: int, token: str | None) -> None:
    request = AWSRequest("GET", f"{endpoint}/timesteps/{quote(key, safe='/~')}")
    S3SigV4QueryAuth(Credentials("AK/IA", "secret", token), "s3", "eu-west-1", expires=seconds).add_auth(request)
    address, _, signed = str(request.url).partition("?")
    theirs = parse_qs(signed, strict_parsing=True)
    now = datetime.strptime(theirs["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    url = Presigner(f"{endpoint}/timesteps", "eu-west-1", "AK/IA", "secret", token).url(key, seconds, now)
    assert url.partition("?")[0] == address
    assert parse_qs(url.partition("?")[2], strict_parsing=True) == theirs


def test_a_url_reads_its_object_only_and_not_for_ever(any_s3: str) -> None:
    store: ObjectStore = make_store(any_s3)
    for key in ("images/ö ä+~&?#%41.tar", "images/other.tar"):
        store.client.put_object(Bucket=store.bucket_name, Key=key, Body=key.encode())
    url = store.presigned_url("images/ö ä+~&?#%41.tar", seconds=1)
    assert urllib3.request("GET", url).data.decode() == "images/ö ä+~&?#%41.tar"


def test_a_changed_or_old_url_is_refused(rados_gateway: RadosGateway) -> None:
    store = make_store(rados_gateway.url)
    for key in ("a.tar", "b.tar"):
        store.client.put_object(Bucket=store.bucket_name, Key=key, Body=b"content")
    url = store.presigned_url("a.tar", seconds=1)
    assert urllib3.request("GET", url).status == 200
    for tampered in (url.replace("a.tar", "b.tar"), url.replace("Expires=1", "Expires=9000")):
        assert urllib3.request("GET", tampered).status == 403
    assert urllib3.request("PUT", url, body=b"other").status == 403
    deadline = time.monotonic() + 15
    while urllib3.request("GET", url).status == 200:
        assert time.monotonic() < deadline
        time.sleep(0.3)
