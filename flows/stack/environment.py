"""The environment of the processes of a stack, and of a shell that wants to talk to it."""

import os

from pydantic import SecretStr

from blocks.settings import Settings

# Would lead boto3 past the settings of an embedded object storage, to the caller's own.
_OTHER_OBJECT_STORAGE = (
    "AWS_DEFAULT_PROFILE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
)


def shell_environment(settings: Settings) -> dict[str, str]:
    """All settings of a stack by the names of their variables, secrets in the clear."""
    env = {}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if value is not None:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            env[Settings.variable(name)] = ",".join(plain) if isinstance(plain, tuple) else str(plain)
    no_proxy = [part for part in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if part]
    loopback = ",".join([*no_proxy, *({"127.0.0.1", "localhost"} - set(no_proxy))])
    return env | {
        "AWS_DEFAULT_REGION": settings.aws_region,
        "DO_NOT_TRACK": "1",
        "NO_PROXY": loopback,
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "no_proxy": loopback,
    }


def process_environment(settings: Settings, *, own_object_storage: bool) -> dict[str, str]:
    """The environment of a part of the stack: the caller's, with the settings of the stack and what suits a log.

    Args:
        own_object_storage: the object storage is the stack's, so nothing of the caller's may point elsewhere.
    """
    # A profile of the caller names things of the caller's PREFECT_HOME, which is not the stack's.
    dropped = {"PREFECT_PROFILE", *(_OTHER_OBJECT_STORAGE if own_object_storage else ())}
    suits_a_log = {"NO_COLOR": "1", "PREFECT_LOGGING_COLORS": "false", "PYTHONUNBUFFERED": "1"}
    defaults = {"PREFECT_LOGGING_LEVEL": "INFO", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return defaults | inherited | suits_a_log | shell_environment(settings)
