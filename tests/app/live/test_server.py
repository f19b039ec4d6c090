"""What a server keeps only while it is needed: recordings of its viewers, the key of its certificate."""

import ssl
from pathlib import Path

import pytest

from fastdiff_app.live.model import LiveModel
from fastdiff_app.live.server import Live, Serving, certificate
from fastdiff_pipelines.live.recording import read
from fastdiff_pipelines.settings import Settings


def test_a_recording_is_whole_when_its_viewer_leaves_before_a_frame(tmp_path: Path) -> None:
    with LiveModel("identity", Settings(""), size=(32, 32)) as model:
        live = Live(model, Serving(recordings=tmp_path))
        session = live.session()
        live.worker.add(session)
        name = live.record(session, True)
        assert name is not None
        # asked for is begun, though no turn has come yet
        with pytest.raises(ValueError, match="already"):
            live.record(session, True)
        live.worker.remove(session)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (head, _) = next(read(tmp_path / name))
    assert (head["kind"], head["model"]) == ("about", "identity")


def test_a_certificate_and_its_key_vanish_with_the_block(tmp_path: Path) -> None:
    with certificate("192.0.2.7", tmp_path) as (key, made):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made, key)
        assert Path(key).stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []
