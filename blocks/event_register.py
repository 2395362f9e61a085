"""What is known of event files: who announced which timestep, and which files were dealt with, and how."""

from collections.abc import Iterable, Iterator
from typing import cast
from uuid import UUID, uuid4

import redis

# Both have to stay as they are while another process looks: a rejection has one episode at a time.
_OPEN = "redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) return redis.call('HGET', KEYS[1], ARGV[1])"
_CLOSE = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
"""


# Longer than anybody may still be about to work on a timestep that was withdrawn.
_REMEMBER_SECONDS = 30 * 24 * 3600


class EventFileRegister:
    """Remembers what became of event files. It lives beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._stream = stream

    # --- timesteps

    def identify(self, timestep_id: str, digest: str) -> str:
        """Bind a timestep's id to what was announced under it, for ever, unless it is bound already.

        Returns:
            The digest the id is bound to: another one than `digest` means a conflict.
        """
        key = f"{self._stream}:identities"
        if self._redis.hsetnx(key, timestep_id, digest):
            return digest
        return cast(str, self._redis.hget(key, timestep_id))

    def identity(self, timestep_id: str) -> str | None:
        """The digest that a timestep's id is bound to, if it is."""
        return cast(str | None, self._redis.hget(f"{self._stream}:identities", timestep_id))

    def withdraw(self, timestep_id: str) -> None:
        """Have nobody begin to upload a timestep any more, and forget what was announced under its id."""
        self._redis.set(self._withdrawn(timestep_id), 1, ex=_REMEMBER_SECONDS)
        self._redis.hdel(f"{self._stream}:identities", timestep_id)

    def is_withdrawn(self, timestep_id: str) -> bool:
        """Whether nobody is to upload a timestep any more."""
        return bool(self._redis.exists(self._withdrawn(timestep_id)))

    # --- files that were dealt with

    def conclude(self, system: str, event_file: str, fingerprint: str) -> None:
        """Remember that an event file, as it is now, was taken in or rejected."""
        self._redis.hset(self._conclusions(system), event_file, fingerprint)

    def forget(self, system: str, event_file: str) -> None:
        """Have an event file looked at again, however it looks then."""
        self._redis.hdel(self._conclusions(system), event_file)

    def ask_again(self, system: str, event_file: str) -> None:
        """Have an event file looked at again, also by a watcher that knows its conclusion."""
        # First of all, so that the look that follows is another piece of work than the one before.
        self._redis.hincrby(self._asked(system), event_file, 1)
        self.forget(system, event_file)
        self._redis.sadd(self._requests(system), event_file)

    def asked(self, system: str, event_file: str) -> int:
        """How often it was asked to look at an event file again."""
        return int(cast(str | None, self._redis.hget(self._asked(system), event_file)) or 0)

    def take_requests(self, system: str) -> set[str]:
        """The event files that are to be looked at again; whoever asks has to do so."""
        asked = cast(list[str], self._redis.spop(self._requests(system), 1000))
        return set(asked)

    def conclusions(self, system: str) -> Iterator[tuple[str, str]]:
        """The event files of a system, and under which fingerprints they were last dealt with.

        Piece by piece: there may be 100,000. One that is dealt with meanwhile may be among them or not.
        """
        pieces = self._redis.hscan_iter(self._conclusions(system), count=1000)
        yield from cast(Iterator[tuple[str, str]], pieces)

    def concluded(self, system: str) -> dict[str, str]:
        """All of these at once."""
        return dict(self.conclusions(system))

    def count_concluded(self, system: str) -> int:
        """How many event files of a system were dealt with."""
        return self._redis.hlen(self._conclusions(system))

    def conclusion(self, system: str, event_file: str) -> str | None:
        """The fingerprint under which one event file was last dealt with, if it was."""
        return cast(str | None, self._redis.hget(self._conclusions(system), event_file))

    def conclusions_of(self, system: str, event_files: Iterable[str]) -> dict[str, str | None]:
        """The same of many event files."""
        names = list(event_files)
        found = cast(list[str | None], self._redis.hmget(self._conclusions(system), names)) if names else []
        return dict(zip(names, found, strict=True))

    # --- files that are rejected

    def open_rejection(self, system: str, event_file: str) -> UUID:
        """The episode in which an event file is rejected: from its first rejection until it is cleared.

        Saying so is the first step of a rejection, so that a crash right after it forgets nothing.
        """
        key = self._rejections(system)
        return UUID(cast(str, self._redis.eval(_OPEN, 1, key, event_file, str(uuid4()))))

    def rejection(self, system: str, event_file: str) -> UUID | None:
        """The episode in which an event file is rejected now, if it is."""
        episode = cast(str | None, self._redis.hget(self._rejections(system), event_file))
        return UUID(episode) if episode else None

    def rejections(self, system: str) -> dict[str, UUID]:
        """The episodes of all event files of a system that are rejected now."""
        known = cast(dict[str, str], self._redis.hgetall(self._rejections(system)))
        return {event_file: UUID(episode) for event_file, episode in known.items()}

    def close_rejection(self, system: str, event_file: str, episode: UUID) -> None:
        """End an episode, once the log says so; the next rejection of the file begins another."""
        self._redis.eval(_CLOSE, 1, self._rejections(system), event_file, str(episode))

    # --- inside

    def _withdrawn(self, timestep_id: str) -> str:
        return f"{self._stream}:withdrawn:{timestep_id}"

    def _conclusions(self, system: str) -> str:
        return f"{self._stream}:event-files:{system}"

    def _requests(self, system: str) -> str:
        return f"{self._stream}:look-again:{system}"

    def _asked(self, system: str) -> str:
        return f"{self._stream}:asked-again:{system}"

    def _rejections(self, system: str) -> str:
        return f"{self._stream}:rejected:{system}"
