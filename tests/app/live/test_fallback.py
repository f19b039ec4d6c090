"""Live through Gradio's own streaming: same model, same places, nothing left behind."""

import base64
import io
import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from fastdiff_app.live.model import LiveModel
from fastdiff_app.live.page.fallback import Fallback
from fastdiff_app.live.server import Live, Serving
from fastdiff_pipelines.settings import Settings


@pytest.fixture
def live() -> Iterator[Live]:
    with LiveModel("identity", Settings(""), size=(32, 32)) as model:
        made = Live(model, Serving(max_users=2))
        with made.worker:
            yield made


def _picture(found: str) -> np.ndarray:
    data = re.search(r'base64,([^"]+)"', found)
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))


def test_each_sees_the_own_camera_and_settings_only(live) -> None:
    held = Fallback(live)
    for who, channel in (("ann", 0), ("ben", 2)):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., channel] = 250
        found = _picture(held.frame(who, frame, prompt=who))
        assert found.shape == (32, 32, 3)
        assert found.mean(axis=(0, 1)).argmax() == channel
    assert {session.controls.settings.prompt for session in live.worker.sessions} == {"ann", "ben"}


def test_places_are_those_of_the_page_and_come_free(live) -> None:
    held, frame = Fallback(live), np.zeros((32, 32, 3), np.uint8)
    for who in ("ann", "ben"):
        held.frame(who, frame)
    with pytest.raises(ValueError, match="2 people"):
        held.frame("cleo", frame)
    held.leave("ann")
    held.leave("ann")
    assert live.viewers == 1
    assert held.frame("cleo", frame)
    assert len(live.worker.sessions) == 2


def test_an_impossible_setting_is_refused_and_the_next_frame_still_works(live) -> None:
    held, frame = Fallback(live), np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="strength"):
        held.frame("ann", frame, strength=7.0)
    assert held.frame("ann", frame, strength=0.5)


def test_who_does_not_look_any_more_is_forgotten(live, monkeypatch) -> None:
    held, frame = Fallback(live), np.zeros((32, 32, 3), np.uint8)
    held.frame("ann", frame)
    monkeypatch.setattr("fastdiff_app.live.page.fallback.FORGOTTEN_S", -1.0)
    held.frame("ben", frame)
    assert len(live.worker.sessions) == 1
    assert live.viewers == 1
