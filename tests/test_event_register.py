"""What is remembered of event files."""

from concurrent.futures import ThreadPoolExecutor

from blocks.event_log import EventLog


def test_an_id_is_bound_to_what_was_announced_first(event_log: EventLog) -> None:
    register = event_log.register
    with ThreadPoolExecutor(8) as threads:
        answers = set(threads.map(lambda number: register.identify("an id", f"digest {number}"), range(8)))
    (bound,) = answers
    assert register.identify("an id", "another digest") == bound
    assert register.identify("another id", "another digest") == "another digest"


def test_conclusions_are_remembered_for_each_system(event_log: EventLog) -> None:
    register = event_log.register
    register.conclude("prince", "events/1.json", "one")
    register.conclude("prince", "events/1.json", "two")
    register.conclude("prince", "events/Zoë\n.json", "three")
    assert register.concluded("prince") == {"events/1.json": "two", "events/Zoë\n.json": "three"}
    assert register.conclusion("prince", "events/1.json") == "two"
    assert register.conclusion("aretha", "events/1.json") is None
    assert register.concluded("aretha") == {}
    register.forget("prince", "events/1.json")
    assert register.conclusion("prince", "events/1.json") is None


def test_a_rejection_has_one_episode_until_it_is_closed(event_log: EventLog) -> None:
    register = event_log.register
    with ThreadPoolExecutor(8) as threads:
        episodes = set(threads.map(lambda _: register.open_rejection("prince", "events/1.json"), range(8)))
    (episode,) = episodes
    assert register.rejections("prince") == {"events/1.json": episode}
    assert register.rejection("aretha", "events/1.json") is None
    register.close_rejection("prince", "events/1.json", episode)
    assert register.rejection("prince", "events/1.json") is None
    later = register.open_rejection("prince", "events/1.json")
    assert later != episode
    register.close_rejection("prince", "events/1.json", episode)  # by a process that was slow
    assert register.rejection("prince", "events/1.json") == later
