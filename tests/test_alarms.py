"""Prometheus itself reads the alarms: each is raised by what it is for, and by nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.compose import ROOT

ALARMS = ROOT / "deploy" / "prometheus" / "alarms.yml"
MINUTES = 300

# A sample a minute of each series while all is well, as Prometheus' own tests write them.
WELL = {
    'up{job="timestep-archiver"}': "1",
    'archiver_reachable{service="database"}': "1",
    'archiver_reachable{service="stream"}': "1",
    "archiver_waiting_event_files": "0",
    'archiver_oldest_event_file_seconds{system="prince"}': "3600",
    'archiver_timesteps{state="failed"}': "0",
    "archiver_rejected_event_files": "0",
    'archiver_group_oldest_waiting_seconds{group="upload-worker"}': "3600",
    'archiver_group_oldest_waiting_seconds{group="state-manager"}': "3600",
    'archiver_group_dead_letters{group="upload-worker"}': "0",
    "archiver_flight_check_failed": "0",
    # These tests begin at the epoch.
    "archiver_flight_check_last_good_seconds": "1+60",
    "archiver_audit_differences": "0",
    "archiver_unreached_timesteps": "0",
    "archiver_silent_systems": "0",
    "archiver_filling_disks": "0",
    "archiver_systems_without_room": "0",
    "archiver_redis_used_bytes": "800",
    "archiver_redis_limit_bytes": "1000",
    "archiver_expiring_objects": "0",
    "archiver_at_risk_timesteps": "0",
}
NONE = "_"  # no sample
# What raises each alarm. It has the labels of the first series.
ILL = {
    "ArchiverDown": {'up{job="timestep-archiver"}': "0"},
    "ArchiverUnreachable": {'archiver_reachable{service="database"}': "0"},
    "NobodyWatches": {'archiver_reachable{service="stream"}': "1", "archiver_waiting_event_files": NONE},
    "IngestStalls": {'archiver_oldest_event_file_seconds{system="prince"}': "3601"},
    "UploadsStall": {'archiver_group_oldest_waiting_seconds{group="upload-worker"}': "3601"},
    "RecordingStalls": {'archiver_group_oldest_waiting_seconds{group="state-manager"}': "3601"},
    "TimestepsFailed": {'archiver_timesteps{state="failed"}': "7"},
    "EventFilesRejected": {"archiver_rejected_event_files": "1"},
    "SetAside": {'archiver_group_dead_letters{group="upload-worker"}': "1"},
    "FlightCheckFailed": {"archiver_flight_check_failed": "1"},
    "NoFlightCheck": {"archiver_flight_check_last_good_seconds": "60"},
    "AuditFoundDifferences": {"archiver_audit_differences": "1"},
    "SystemUnreached": {"archiver_unreached_timesteps": "2"},
    "SystemSilent": {"archiver_silent_systems": "1"},
    "DiskFilling": {"archiver_filling_disks": "1"},
    "NoRoomInStaging": {"archiver_systems_without_room": "1"},
    "RedisFilling": {"archiver_redis_used_bytes": "801"},
    "ObjectsExpire": {"archiver_expiring_objects": "5"},
    "NotOnTape": {"archiver_at_risk_timesteps": "1"},
}


def unit_test(raised: str | None) -> dict[str, object]:
    """A test in Prometheus' own format: this alarm is raised, and no other."""
    series = {**WELL, **ILL.get(raised or "", {})}
    labels = dict(re.findall(r'(\w+)="([^"]*)"', next(iter(ILL[raised])))) if raised else {}
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{value}x{MINUTES}"} for name, value in series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{MINUTES}m",
                "alertname": alarm,
                "exp_alerts": [{"exp_labels": labels}] if alarm == raised else [],
            }
            for alarm in ILL
        ],
    }


def test_each_alarm_is_raised_by_what_it_is_for_and_by_nothing_else(tmp_path: Path) -> None:
    rules = yaml.safe_load(ALARMS.read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == list(ILL)
    if not shutil.which("promtool"):
        pytest.skip("needs promtool, of the Debian package prometheus")
    tests = tmp_path / "tests.yml"
    tests.write_text(yaml.safe_dump({"rule_files": [str(ALARMS)], "tests": [unit_test(None), *map(unit_test, ILL)]}))
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_job_of_the_runbook_is_the_one_that_the_alarms_are_about(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "runbook.md").read_text(), re.DOTALL)
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert set(re.findall(r'job="([^"]+)"', ALARMS.read_text())) == {job["job_name"]}
    if not shutil.which("promtool"):
        pytest.skip("needs promtool, of the Debian package prometheus")
    shutil.copy(ALARMS, tmp_path)
    (tmp_path / "archiver_api_token").write_text("token")
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus", str(tmp_path)))
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ILL)} rules found" in done.stdout
