"""What can go wrong with object storage."""

from blocks.errors import ArchiverError


class ObjectStoreError(ArchiverError):
    """Object storage can't do what was asked; the message names bucket, endpoint or key."""


class Refused(ObjectStoreError):
    """The store answered a request with an error, and asking again would not help.

    Attributes:
        code: S3's name for the cause, such as `NoSuchUpload`; the HTTP status where it gave none.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class BucketMissing(ObjectStoreError):
    """The bucket does not exist."""


class KeyTaken(ObjectStoreError):
    """Another object has the key. It is never overwritten."""


class NotStored(ObjectStoreError):
    """There is no such object, or what is stored is not what was sent."""
