"""No service of compose.yml comes near its limit of memory while timesteps as large as in a lab go through."""

import json
import re

import pytest

from tests import memory_groups
from tests.compose import ROOT
from tests.network import missing, run_in_sandbox


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_limits_are_twice_what_is_held_at_most() -> None:
    if reason := missing() or memory_groups.missing():
        pytest.skip(reason)
    held = json.loads(run_in_sandbox("tests.storm_in_limits", 490).splitlines()[-1])
    said = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (ROOT / "docs" / "production.md").read_text(), re.MULTILINE)
    assert held.keys() >= {name for name, _ in said}
    for name, (peak, limit, kills) in held.items():
        assert kills == 0, name
        assert peak < limit / 2, f"{name}: {peak}"
    for name, megabytes in said:
        if name == "init":
            continue  # it has ended before anybody looks
        assert abs(held[name][0] / 1e6 - int(megabytes)) < 0.3 * int(megabytes), f"{name}: {held[name]}"
