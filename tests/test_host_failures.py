"""Several hosts, as network namespaces: some are lost in the middle, and every timestep arrives exactly once."""

import pytest

from tests.network import missing, run_in_sandbox


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_hosts_are_lost_and_every_timestep_arrives_exactly_once() -> None:
    if reason := missing():
        pytest.skip(reason)
    run_in_sandbox("tests.host_failures", 390)
