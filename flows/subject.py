"""Which timestep a flow run is about, before anything of it was executed."""

from uuid import UUID


def timestep_of(key: str | None) -> UUID | None:
    """The timestep that a piece of work is about, or the run that was created for it; None if that can't be told.

    Args:
        key: of the work, or the run's idempotency key, which begins with it. Where the work is about one
            timestep, that begins with the timestep's id and a colon.
    """
    subject, colon, _ = (key or "").partition(":")
    try:
        return UUID(subject) if colon else None
    except ValueError:
        return None
