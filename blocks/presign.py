"""URLs that carry their own permission: AWS signature version 4 in the query.

botocore takes some forty times as long for one, which would be most of what a list of a hundred costs.
"""

import hashlib
import hmac
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote, urlsplit

_ALGORITHM = "AWS4-HMAC-SHA256"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Presigner:
    """Makes URLs that anyone can read an object of one bucket with, for a while.

    Args:
        bucket_url: address of the bucket, path style, without a query: `https://s3.example.org/bucket`.
    """

    def __init__(self, bucket_url: str, region: str, access_key: str, secret_key: str, token: str | None) -> None:
        address = urlsplit(bucket_url)
        host = f"[{address.hostname}]" if ":" in (address.hostname or "") else address.hostname
        # As clients write the Host header.
        port = f":{address.port}" if address.port and address.port != _DEFAULT_PORTS[address.scheme] else ""
        self._origin = f"{address.scheme}://{address.netloc}"
        self._path = quote(address.path)
        self._headers = f"host:{host}{port}\n"
        self._region = region
        self._access_key = access_key
        self._secret_key = secret_key
        self._token = f"&X-Amz-Security-Token={quote(token, safe='')}" if token else ""

    def url(self, key: str, seconds: int, now: datetime | None = None) -> str:
        """A URL for one object, that is good for so many seconds from `now` on."""
        time = f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        scope = f"{time[:8]}/{self._region}/s3/aws4_request"
        path = f"{self._path}/{quote(key, safe='/~')}"
        # In the order of their names, as they are signed.
        query = (
            f"X-Amz-Algorithm={_ALGORITHM}&X-Amz-Credential={quote(f'{self._access_key}/{scope}', safe='')}"
            f"&X-Amz-Date={time}&X-Amz-Expires={seconds}{self._token}&X-Amz-SignedHeaders=host"
        )
        request = f"GET\n{path}\n{query}\n{self._headers}\nhost\nUNSIGNED-PAYLOAD"
        signed = f"{_ALGORITHM}\n{time}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(_signing_key(self._secret_key, scope), signed.encode(), hashlib.sha256).hex()
        return f"{self._origin}{path}?{query}&X-Amz-Signature={signature}"


@lru_cache(maxsize=8)
def _signing_key(secret_key: str, scope: str) -> bytes:
    """The key of one day, region and service."""
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    return key
