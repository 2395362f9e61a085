"""What is known of an object in the store, and of each image in it, once that was proven."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class Image(BaseModel):
    """One file in a tar, found again by a range request."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(description="Path below the image directory, as in the tar without its './'.")
    offset: int = Field(description="Where its bytes begin in the object.")
    size: int = Field(description="Bytes.")
    sha256: str


class Proof(BaseModel):
    """What was checked after an upload or before a purge, and when. Each entry of `checks` is a sentence."""

    model_config = ConfigDict(frozen=True)
    verified_at: datetime
    checks: list[str]


class ProvenObject(BaseModel):
    """What is known of an object that was proven to be in the store. The size is in bytes."""

    model_config = ConfigDict(frozen=True)
    key: str
    size: int
    etag: str
    sha256: str | None = Field(description="Of all of it; null where it was found in the bucket, and not read whole.")
    layout_digest: str
    images: list[Image]
    proof: Proof
    modified_at: datetime | None = Field(
        None, description="When the store got it, by the store's clock; null where an older release said it."
    )
