"""When the bucket deletes objects by itself."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from blocks.event_file import TimestepType
from blocks.lifecycle import read_lifecycle
from blocks.object_errors import ObjectStoreError, Refused
from blocks.object_store import ObjectStore
from blocks.s3_wire import S3Wire

logger = logging.getLogger(__name__)

# Rules change rarely; so long what was read of them is used again.
REMEMBER_SECONDS = 60.0

# What a storage answers that knows of no such thing: nobody can have given it a rule.
_NO_LIFECYCLE = "NotImplemented"


class RulesUnknown(Exception):
    """It can't be told when the bucket deletes objects; the message says why."""


@dataclass(frozen=True)
class ExpiryRule:
    """Objects below a prefix are deleted: so many days after they were stored, or all of them from a day on."""

    prefix: str
    days: int | None = None
    on: datetime | None = None
    is_for_tagged: bool = False
    """Only what has a tag."""
    name: str = field(default="without a name", compare=False)

    @property
    def is_for_timesteps(self) -> bool:
        """Whether the keys that it is for can be those of timesteps."""
        homes = [f"{type.prefix}/" for type in TimestepType if type is not TimestepType.FLIGHT_CHECK]
        return any(home.startswith(self.prefix) or self.prefix.startswith(home) for home in homes)

    def deletes_at(self, stored_at: datetime) -> datetime:
        """When it deletes what was stored at a moment."""
        return self.on if self.on is not None else stored_at + timedelta(days=self.days or 0)

    def dooms_before(self, moment: datetime) -> datetime:
        """It deletes by that moment what was stored before the one returned."""
        if self.on is not None:
            return moment if self.on <= moment else datetime.min.replace(tzinfo=UTC)
        return moment - timedelta(days=self.days or 0)


class ExpiryRules:
    """The lifecycle rules that delete objects: of the store's bucket, or of another one there."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # By bucket, and until when that is good.
        self._known: dict[str, tuple[list[ExpiryRule] | RulesUnknown, float]] = {}

    def read(self, bucket: str | None = None) -> list[ExpiryRule]:
        """Those for objects that are not tagged as being on tape; none where they can't be read, which is logged.

        Args:
            bucket: the store's own if none is given.
        """
        try:
            return [rule for rule in self.ask(bucket or self._store.bucket_name) if not rule.is_for_tagged]
        except RulesUnknown:
            return []

    def ask(self, bucket: str) -> list[ExpiryRule]:
        """All rules of a bucket.

        Raises:
            RulesUnknown: when they can't be read.
        """
        rules, good_until = self._known.get(bucket, ([], 0.0))
        if time.monotonic() >= good_until:
            rules = self._read(bucket)
            self._known[bucket] = rules, time.monotonic() + REMEMBER_SECONDS
        if isinstance(rules, RulesUnknown):
            raise rules
        return rules

    def _read(self, bucket: str) -> list[ExpiryRule] | RulesUnknown:
        try:
            return _read(self._store.of_bucket(bucket).wire)
        except ObjectStoreError as error:
            reason = f"the lifecycle rules of bucket {bucket} can't be read: {error}"
            logger.warning("%s%s", reason[0].upper(), reason[1:])
            return RulesUnknown(reason)


def _read(wire: S3Wire) -> list[ExpiryRule]:
    try:
        found = read_lifecycle(wire)
    except Refused as error:
        if error.code == _NO_LIFECYCLE:
            return []
        raise
    rules = []
    for rule in found:
        expiration, chosen = rule.get("Expiration", {}), rule.get("Filter", {})
        both = chosen.get("And", {})
        days, on = expiration.get("Days"), expiration.get("Date")
        if rule["Status"] == "Enabled" and (days or on):
            # Whatever else narrows a rule may still leave our objects to it.
            prefix = chosen.get("Prefix") or both.get("Prefix") or rule.get("Prefix") or ""
            is_for_tagged = bool(chosen.get("Tag") or both.get("Tags"))
            rules.append(ExpiryRule(prefix, days, on, is_for_tagged, rule.get("ID", "without a name")))
    return rules


def days_left(rules: Sequence[ExpiryRule], key: str, stored_at: datetime, now: datetime) -> float | None:
    """Days until the first of these rules deletes an object; None where none does."""
    ends = [rule.deletes_at(stored_at) for rule in rules if key.startswith(rule.prefix)]
    return round((min(ends) - now) / timedelta(days=1), 2) if ends else None
