# One image for the four entrypoints, for `archiver init` and for the Prefect server.
# The target `dev` has the embedded servers too: compose.dev.yml runs its object storage with it.

FROM python:3.11.14-slim-bookworm AS build
WORKDIR /src
COPY scripts/tools.lock requirements-image.lock ./
# The cache is no part of the image: after a change of the lock, only what is new is downloaded.
ENV UV_LINK_MODE=copy
RUN --mount=type=cache,target=/root/.cache/uv \
    python -m pip install --quiet --no-cache-dir --require-hashes -r tools.lock \
    && python -m venv --without-pip /opt/archiver \
    && uv pip sync --quiet --compile-bytecode --require-hashes \
        --python /opt/archiver/bin/python requirements-image.lock
COPY pyproject.toml README.md prefect.yaml ./
COPY migrations migrations
COPY blocks blocks
COPY api api
COPY flows flows
RUN python -m hatchling build --target wheel --directory /dist \
    && uv pip install --quiet --no-cache --no-deps --compile-bytecode \
        --python /opt/archiver/bin/python /dist/*.whl
COPY --chmod=755 deploy/image/with-secrets deploy/image/healthy /opt/archiver/bin/

FROM build AS build-dev
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip sync --quiet --compile-bytecode --require-hashes \
        --python /opt/archiver/bin/python requirements.lock \
    && uv pip install --quiet --no-cache --no-deps --compile-bytecode \
        --python /opt/archiver/bin/python /dist/*.whl

FROM python:3.11.14-slim-bookworm AS base
RUN groupadd --gid 10001 archiver \
    && useradd --uid 10001 --gid archiver --no-create-home --home-dir /tmp --shell /usr/sbin/nologin archiver
# Nothing is written but below /tmp, so the root file system may be read-only.
ENV PATH=/opt/archiver/bin:$PATH \
    HOME=/tmp \
    ARCHIVER_HOME=/tmp/archiver \
    ARCHIVER_HEARTBEAT_FILE=/tmp/heartbeat \
    PREFECT_HOME=/tmp/prefect \
    PREFECT_LOGGING_COLORS=false \
    PREFECT_WORKER_QUERY_SECONDS=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/tmp/prefect-ui \
    PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED=events,flow_runs \
    DO_NOT_TRACK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["with-secrets"]
CMD ["archiver", "--help"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s CMD ["healthy"]

FROM base AS dev
COPY --from=build-dev /opt/archiver /opt/archiver

FROM base AS runtime
COPY --from=build /opt/archiver /opt/archiver
