"""The pages in a real browser: what an operator sees, on a desk and on a telephone."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from blocks.event_log import EventLog
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from tests.chromium import Chromium, chromium_program
from tests.events import NOON, announced, archived, failed, ingested, rejected, uploaded
from tests.gateway import record
from tests.served_api import served

TOKEN = "read-only-token-of-the-tests"


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    if chromium_program() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    home = tmp_path / "chromium"
    home.mkdir()
    with Chromium.running(home) as chromium:
        yield chromium


def test_an_operator_sees_what_needs_a_hand(
    chromium: Chromium, settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine
) -> None:
    broken = announced(experiment_id="broken")
    events = [announced(position=position, timestamp=NOON + timedelta(minutes=position)) for position in range(20)]
    reason = "no room for " + "a-very-long-name-without-any-space-" * 8
    record(
        engine,
        event_log,
        *map(ingested, events),
        *map(uploaded, events[:15]),
        *(archived(event.key) for event in events[:5]),
        failed(broken, reason=reason),
        rejected(f"events/{'x' * 120}.json", reason=reason),
    )
    with served(settings.model_copy(update={"api_token": SecretStr(TOKEN)})) as url:
        chromium.look(1200)
        chromium.open(url)
        assert "needs the token" in chromium.evaluate("document.body.innerText")
        # Of the form's own status, 401.
        assert len(chromium.complaints) <= 1
        chromium.complaints.clear()
        chromium.follow(f"document.querySelector('[name=token]').value = '{TOKEN}'; document.forms[0].submit()")
        text = chromium.evaluate("document.body.innerText")
        assert text.index("Needs a hand") < text.index("1 failed.") < text.index("Timesteps")
        _reads_well(chromium)
        chromium.follow("document.querySelector('tbody tr td:last-child a').click()")
        assert "timestep.ingested" in chromium.evaluate("document.body.innerText")
        _reads_well(chromium)
        chromium.open(f"{url}/timesteps/{broken.timestep_id}")
        assert reason in chromium.evaluate("document.querySelector('.alarm').innerText")
        _reads_well(chromium)
        chromium.open(f"{url}/docs")
        assert chromium.evaluate("typeof SwaggerUIBundle") == "function"
        assert chromium.complaints == []
        assert [address for address in chromium.requested if not address.startswith((url, "data:"))] == []


def _reads_well(chromium: Chromium) -> None:
    """Nothing leads out of the window sideways, and in the dark it is dark."""
    shades = []
    for width, dark in ((360, False), (1200, True), (1200, False)):
        chromium.look(width, dark=dark)
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        shades.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert shades[0] == shades[2] != shades[1]
