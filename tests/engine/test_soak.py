"""A few seconds of the soak test; `python -m tests.engine.soak --minutes 60` is the full one."""

from tests.engine.make import tiny
from tests.engine.soak import SETTINGS, Soak


def test_texts_under_mixed_load_are_those_of_requests_alone(tmp_path):
    soak = Soak(tiny(tmp_path)[0])
    soak.run(3)
    for act in (soak.batch, soak.streams, soak.threads, soak.refused):
        act()
    assert soak.checked >= 8
    assert len(set(soak.expected.values())) > len(SETTINGS)
