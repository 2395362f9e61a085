"""The addresses among the settings: each is whole, and begins as its service's do."""

from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr


def _checked(*schemes: str) -> Callable[[str], str]:
    """What refuses an address that is none, or not of these schemes. What it says has nothing of the address."""
    beginnings = [f"{scheme}://" for scheme in schemes]

    def check(value: str) -> str:
        if not value.startswith(tuple(beginnings)):
            raise ValueError(f"it has to begin with {' or '.join(beginnings)}")
        try:
            address = urlsplit(value)
            is_whole = "@" not in address.path + address.fragment and address.port != 0
        except ValueError:
            is_whole = False
        # It would be taken apart in the middle of its password, which would then be shown in an error.
        if not is_whole:
            raise ValueError(
                "it is no address; in a password, special characters stand as their codes: / as %2F, # as %23"
            )
        return value

    return check


def _secret(check: Callable[[str], str]) -> Callable[[SecretStr], SecretStr]:
    return lambda value: SecretStr(check(value.get_secret_value()))


def _of_server(value: str) -> str:
    address = urlsplit(value)
    if not address.hostname:
        raise ValueError("it names no host")
    # It gets into pages and answers.
    if "@" in address.netloc:
        raise ValueError("it has to be without user and password; those of Prefect are PREFECT_API_AUTH_STRING")
    return value.rstrip("/")


DatabaseUrl = Annotated[SecretStr, AfterValidator(_secret(_checked("postgresql", "postgres", "postgresql+psycopg")))]
RedisUrl = Annotated[SecretStr, AfterValidator(_secret(_checked("redis", "rediss", "unix")))]
BrokerUrl = Annotated[SecretStr, AfterValidator(_secret(_checked("amqp", "amqps")))]
HttpUrl = Annotated[str, AfterValidator(_checked("http", "https")), AfterValidator(_of_server)]
