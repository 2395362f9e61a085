"""A database with as many timesteps as one likes, written by PostgreSQL itself.

Experiments of 40 positions with 50 timesteps each, five experiments at a time, two hours between two timesteps of
a position. Almost all are on tape; the last thousand are uploaded only, and a few failed or wait.
"""

import psycopg

POSITIONS = 40
STEPS = 50
PER_EXPERIMENT = POSITIONS * STEPS
AT_A_TIME = 5
# Images of so many timesteps only: a hundred per timestep would be a hundred million rows.
WITH_IMAGES = 1_000
REJECTED = 1_000

_TIMESTEPS = """
insert into timestep (
    id, system, experiment_id, plate, cross_date, position, type, timestamp, image_count, image_dir, announced,
    event_file, ingested_at, uploaded_at, archived_at, failed_at, failed_stage, failed_reason,
    bucket, key, size, etag, sha256, layout_digest, upload_started_at, verified_at, checks
)
select id, system, experiment_id, plate, taken::date, position, 'stitch', taken, 150, experiment_id || '/' || number,
    json_build_object('timestep_id', id, 'plate', plate, 'position', position, 'timestamp', taken, 'img_count', 150),
    'events/' || number || '.json', taken + interval '1 minute',
    uploaded_at, case when age >= 1000 then uploaded_at + interval '1 day' end,
    case when age %% 300 = 7 and uploaded_at is null then taken + interval '3 minutes' end,
    case when age %% 300 = 7 and uploaded_at is null then 'upload' end,
    case when age %% 300 = 7 and uploaded_at is null then 'the share is away' end,
    case when uploaded_at is not null then 'timesteps' end,
    case when uploaded_at is not null then 'images/' || experiment_id || to_char(taken, '/YYYYMMDD/HH24MISS_')
        || left(id::text, 8) || '.tar' end,
    case when uploaded_at is not null then 600000000 + number %% 1000 end,
    case when uploaded_at is not null then md5(id::text) end,
    case when uploaded_at is not null then md5(id::text) || md5(id::text) end,
    case when uploaded_at is not null then md5(id::text) || md5(id::text) end,
    uploaded_at - interval '1 minute', uploaded_at,
    case when uploaded_at is not null then '["It was read back."]'::json end
from (
    select *, md5(number::text)::uuid as id, 'microscope-' || plate %% 4 as system,
        to_char(date '2025-01-01' + batch, 'YYYYMMDD_') || to_char(plate, 'FM000') as experiment_id,
        case when age %% 300 not in (7, 8) or age > 3000 then taken + interval '2 minutes' end as uploaded_at
    from (
        -- In the order in which they are taken: step by step of the experiments that run at a time.
        select number, %(timesteps)s - 1 - number as age, number %% %(positions)s as position,
            number / %(batch)s as batch, number / %(positions)s %% %(at_a_time)s as plate,
            date_trunc('minute', now()) - interval '3 days' + number %% %(positions)s * interval '1 minute'
                - (%(timesteps)s - 1 - number) / %(wave)s * interval '2 hours' as taken
        from generate_series(0, %(timesteps)s - 1) as number
    ) as one
) as timestep
"""

_FIRST_EVENT = """
insert into timestep_event (id, entry_id, type, source, time, timestep_id, system, event_file, data)
select md5('ingested' || id)::uuid, extract(epoch from ingested_at)::bigint || '000-0', 'timestep.ingested',
    'archiver/event-ingester', ingested_at, id, system, event_file,
    json_build_object('timestep_id', id, 'system', system, 'event_file', event_file, 'event', announced)
from timestep
"""

_SECOND_EVENT = """
insert into timestep_event (id, entry_id, type, source, time, timestep_id, system, data)
select md5('uploaded' || id)::uuid, extract(epoch from uploaded_at)::bigint || '000-0', 'timestep.uploaded',
    'archiver/upload-worker', uploaded_at, id, system,
    json_build_object('timestep_id', id, 'system', system, 'bucket', bucket, 'key', key, 'size', size,
        'etag', etag, 'sha256', sha256, 'flow_run_id', md5('run' || id)::uuid, 'event', announced)
from timestep where uploaded_at is not null
"""

_THIRD_EVENT = """
insert into timestep_event (id, entry_id, type, source, time, timestep_id, key, data)
select md5('archived' || id)::uuid, extract(epoch from archived_at)::bigint || '000-0', 'timestep.archived',
    'surf-archiver', archived_at, id, key,
    json_build_object('timestep_id', id, 'key', key, 'date', uploaded_at::date,
        'job_id', md5('job' || uploaded_at::date)::uuid,
        'archive', 'images/' || experiment_id || to_char(uploaded_at, '/YYYYMMDD') || '.tar')
from timestep where archived_at is not null
"""

_EVENTS = (_FIRST_EVENT, _SECOND_EVENT, _THIRD_EVENT)

_ARCHIVES = """
insert into archive (id, path, date, job_id, archived_at)
select md5(experiment_id || day)::uuid, 'images/' || experiment_id || to_char(day, '/YYYYMMDD') || '.tar', day,
    md5('job' || day)::uuid, day + interval '1 day'
from (select distinct experiment_id, uploaded_at::date as day from timestep where archived_at is not null) as days
"""

_MEMBERS = """
insert into archive_member (archive_id, key, job_id, archived_at)
select md5(experiment_id || uploaded_at::date)::uuid, key, md5('job' || uploaded_at::date)::uuid, archived_at
from timestep where archived_at is not null
"""

_REJECTED = """
insert into rejected_event_file (
    system, event_file, id, reason, fingerprint, rejected_at, timestep_id, experiment_id, position, type, timestamp
)
select system, 'events/rejected-' || id || '.json', md5('rejected' || id)::uuid, 'images are missing', '', taken, id,
    experiment_id, position, type, timestamp
from (
    select *, timestamp + interval '1 hour' as taken from timestep order by timestamp desc, id limit %(rejected)s
) as newest
"""

_IMAGES = """
insert into timestep_image (timestep_id, name, "offset", size, sha256)
select id, 'Img/Img_' || to_char(image, 'FM000') || '.tif', 1024 + image * 4000512, 4000000,
    md5(id::text) || md5(image::text)
from (select id from timestep where uploaded_at is not null order by timestamp desc limit %(with_images)s) as newest,
    generate_series(0, 149) as image
"""


def fill(database_url: str, timesteps: int) -> None:
    """Write so many timesteps into an empty database, with their history, their archives, and images of the newest."""
    values = {
        "timesteps": timesteps,
        "positions": POSITIONS,
        "at_a_time": AT_A_TIME,
        "wave": POSITIONS * AT_A_TIME,
        "batch": PER_EXPERIMENT * AT_A_TIME,
        "with_images": WITH_IMAGES,
        "rejected": REJECTED,
    }
    with psycopg.connect(database_url, autocommit=True) as connection:
        for statement in (_TIMESTEPS, *_EVENTS, _ARCHIVES, _MEMBERS, _IMAGES, _REJECTED):
            connection.execute(statement.encode(), values)
        connection.execute("vacuum analyze")
