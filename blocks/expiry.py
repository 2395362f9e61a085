"""When the bucket deletes objects by itself."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from botocore.exceptions import BotoCoreError, ClientError

from blocks.object_store import ObjectStore

logger = logging.getLogger(__name__)

# Rules change rarely; so long what was read of them is used again.
REMEMBER_SECONDS = 60.0


@dataclass(frozen=True)
class ExpiryRule:
    """Objects below a prefix are deleted after so many days."""

    prefix: str
    days: int


class ExpiryRules:
    """The bucket's lifecycle rules that delete objects."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._rules: list[ExpiryRule] = []
        self._good_until = 0.0

    def read(self) -> list[ExpiryRule]:
        """The rules; none where they can't be read, which is logged."""
        if time.monotonic() >= self._good_until:
            try:
                self._rules = _read(self._store)
            except (ClientError, BotoCoreError) as error:
                logger.warning("The lifecycle rules of bucket %s can't be read: %s", self._store.bucket_name, error)
                self._rules = []
            self._good_until = time.monotonic() + REMEMBER_SECONDS
        return self._rules


def _read(store: ObjectStore) -> list[ExpiryRule]:
    try:
        answer = store.client.get_bucket_lifecycle_configuration(Bucket=store.bucket_name)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchLifecycleConfiguration":
            return []
        raise
    rules = []
    for rule in answer["Rules"]:
        days = rule.get("Expiration", {}).get("Days")
        chosen = rule.get("Filter", {})
        # Rules for tagged objects are for those that are on tape.
        if rule["Status"] == "Enabled" and days and not (chosen.get("Tag") or chosen.get("And", {}).get("Tags")):
            prefix = chosen.get("Prefix") or chosen.get("And", {}).get("Prefix") or rule.get("Prefix") or ""
            rules.append(ExpiryRule(prefix, days))
    return rules


def days_left(rules: Sequence[ExpiryRule], key: str, age: timedelta) -> float | None:
    """Days until the first of these rules deletes an object of this age; None where none does."""
    days = [rule.days for rule in rules if key.startswith(rule.prefix)]
    return round(min(days) - age / timedelta(days=1), 2) if days else None
