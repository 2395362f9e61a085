"""Signed S3 requests over urllib3, as they are.

botocore builds its requests slowly and copies their bodies. Its signer is used all the same, and its
client for requests that carry few bytes.
"""

import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import quote, urlencode

import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.httpsession import get_cert_path
from botocore.parsers import ResponseParserError
from prefect_aws import AwsCredentials
from urllib3.exceptions import HTTPError

from blocks.object_errors import ObjectStoreError, Refused
from blocks.pace import Pace
from blocks.presign import Presigner
from blocks.retry import Patience, Transient

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
P = ParamSpec("P")

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

# As many as all uploads of a process may need at the same time: one that is not kept costs the next request a
# connection of its own, over TLS with all that belongs to it.
_KEPT_CONNECTIONS = 256

_PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_CODE = re.compile(rb"<Code>([^<]*)</Code>")
# Bytes that were altered on their way, or were too slow: sending them again helps.
_PASSING_CODES = {"XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown"}


class _PayloadSigner(S3SigV4Auth):
    """Signs a request whose body's hash is known; the body itself isn't needed for it."""

    def payload(self, request: AWSRequest) -> str:
        sha256: str = request.context["payload_sha256"]
        return sha256


class S3Wire:
    """The way to one bucket, over connections that are kept open. Threads may share it.

    Failures that may pass by themselves raise `Transient`, for `patience` to try again.

    Args:
        client: for its endpoint and region.
        timeout: seconds without any progress after which an attempt has failed.
    """

    def __init__(
        self,
        client: "S3Client",
        credentials: AwsCredentials,
        bucket: str,
        timeout: float,
        patience: Patience,
        pace: Pace | None,
    ) -> None:
        self.client = client
        self.bucket = bucket
        self.patience = patience
        self.pace = pace
        self.location = f"bucket {bucket} at {client.meta.endpoint_url}"
        self._bucket_url = f"{client.meta.endpoint_url}/{bucket}"
        self._region = client.meta.region_name
        keys = credentials.get_boto3_session().get_credentials()
        if keys is None:
            raise ObjectStoreError(f"there are no credentials for {self._bucket_url}")
        self._keys = keys
        frozen = keys.get_frozen_credentials()
        self.presigner = Presigner(
            self._bucket_url, self._region, frozen.access_key or "", frozen.secret_key or "", frozen.token
        )
        self._pool = urllib3.PoolManager(
            num_pools=1,
            maxsize=_KEPT_CONNECTIONS,
            retries=False,
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            **_trust(credentials),
        )

    def call(self, what: str, operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call one of the client's methods with our patience and our errors.

        Args:
            what: is being done, for the message should it fail.

        Raises:
            Refused: if the store says no.
            ObjectStoreError: when patience ends.
        """
        return self.patience.retry(what, partial(_translate_errors, what, partial(operation, *args, **kwargs)))

    def request(
        self,
        method: str,
        key: str,
        query: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        sha256: str = EMPTY_SHA256,
        body: Iterable[Any] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send one request; the answer's body is not read yet, and has to be closed.

        Args:
            sha256: of the body, in hex. The store refuses a body that does not match it.

        Raises:
            Transient: if asking again may help.
            Refused: if the store says no.
            ObjectStoreError: if the endpoint's certificate is not trusted.
        """
        url = f"{self._bucket_url}/{quote(key)}"
        if query:
            url += "?" + urlencode(query, quote_via=quote)
        request = AWSRequest(method, url, headers)
        request.context["payload_sha256"] = sha256
        _PayloadSigner(self._keys.get_frozen_credentials(), "s3", self._region).add_auth(request)
        try:
            answer = self._pool.request(
                method, url, body=body, headers=dict(request.headers.items()), preload_content=False, redirect=False
            )
        except HTTPError as error:
            if isinstance(error.__context__, ssl.SSLCertVerificationError):
                raise ObjectStoreError(f"the certificate of {self._bucket_url} is not trusted: {error}") from error
            raise Transient(str(error)) from error
        if answer.status < HTTPStatus.BAD_REQUEST:
            return answer
        with closing(answer):
            raise self._error(method, key, answer)

    def server_time(self) -> datetime | None:
        """What time it is for the endpoint, whoever asks; None if it does not answer at once, or does not tell."""
        try:
            answer = self._pool.request("HEAD", self._bucket_url, redirect=False)
        except HTTPError:
            return None
        date = answer.headers.get("date")
        return parsedate_to_datetime(date) if date else None

    @staticmethod
    def _error(method: str, key: str, answer: urllib3.BaseHTTPResponse) -> Exception:
        try:
            code = _CODE.search(answer.read(1 << 16))
        except HTTPError:
            code = None
        name = code[1].decode() if code else str(answer.status)
        if answer.status in _PASSING_STATUSES or name in _PASSING_CODES:
            pause = answer.headers.get("retry-after", "")
            return Transient(f"the store answered {answer.status} {name}", int(pause) if pause.isdecimal() else 0)
        return Refused(f"{method} {key}: the store answered {answer.status} {name}", name)


def _trust(credentials: AwsCredentials) -> dict[str, Any]:
    """Whose certificates to accept, as botocore would."""
    parameters = credentials.aws_client_parameters
    if parameters.verify is False:
        return {"cert_reqs": "CERT_NONE"}
    authorities = parameters.verify_cert_path or os.environ.get("AWS_CA_BUNDLE")
    return {"cert_reqs": "CERT_REQUIRED", "ca_certs": str(authorities) if authorities else get_cert_path(True)}


def _translate_errors(what: str, operation: Callable[[], T]) -> T:
    try:
        return operation()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an unknown error")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status in _PASSING_STATUSES or code in _PASSING_CODES:
            raise Transient(f"the store answered {status} {code}") from error
        raise Refused(f"{what}: the store answered {status} {code}", code) from error
    except (HTTPClientError, ResponseParserError) as error:
        raise Transient(str(error)) from error
    except BotoCoreError as error:
        raise ObjectStoreError(f"{what}: {error}") from error
