"""The WebSocket against everything a stranger may send: clear errors, nothing leaked, others unharmed."""

import asyncio
import contextlib
import io
import json
import struct
import threading

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fastdiff_app.live import messages, pictures
from fastdiff_app.live.messages import Wrong
from fastdiff_app.live.model import LiveModel
from fastdiff_pipelines.live import IdentityStream
from fastdiff_pipelines.settings import Settings


def test_a_frame_comes_back_with_its_id_and_the_ledger_adds_up(server, jpeg, picture_of, text_of) -> None:
    async def main() -> dict:
        async with server.viewer() as socket:
            await text_of(socket, "hello")
            for number in range(30):
                await socket.send(messages.frame_in(number, server.live.worker.clock() * 1000, jpeg))
                frame_id, captured, _, picture = await picture_of(socket)
                assert frame_id == number
                assert np.asarray(Image.open(io.BytesIO(picture))).shape == (32, 32, 3)
                await socket.send(messages.painted(number, server.live.worker.clock() * 1000 - captured))
            while True:
                found = (await text_of(socket, "ledger"))["ledger"]
                if found["frames"]["shown"] == 30:
                    return found

    found = asyncio.run(main())
    assert found["frames"] == {"in": 30, "shown": 30, "repeated": 0, "dropped": {}}
    assert found["unexplained_ms"]["p50"] <= 2


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"", "begins with"),
        (b"\x09abc", "begins with"),
        (b"\x01\x00\x00", "without a picture"),
        (struct.pack("<BId", 1, 0, float("nan")) + b"x", "finite"),
        (b"\x02\x00", "acknowledgement has"),
        ("{", "must be JSON"),
        ("[" * 5000, "must be JSON"),
        ('{"type": "launch"}', "type is one of"),
        ('{"type": "set", "changes": {"height": 4}}', "cannot be set"),
        ('{"type": "set", "changes": {"strength": 40}}', "strength must be"),
        ('{"type": "set", "changes": {"steps": "many"}}', "steps must be"),
        ('{"type": "set", "seconds": -4, "changes": {"seed": 4}}', "ramp lasts"),
        ('{"type": "record", "on": true}', "--record"),
        ('"' + "x" * 20000 + '"', "at most"),
    ],
)
def test_a_wrong_message_gets_one_clear_answer_and_the_next_frame_still_works(
    server, jpeg, picture_of, text_of, message, said
) -> None:
    async def main() -> None:
        async with server.viewer() as socket:
            await socket.send(message)
            assert said in (await text_of(socket, "error"))["message"]
            await socket.send(messages.frame_in(5, 0.0, jpeg))
            assert (await picture_of(socket))[0] == 5

    asyncio.run(main())


def _bomb() -> bytes:
    """A small file of a huge picture."""
    file = io.BytesIO()
    Image.new("L", (16000, 16000)).save(file, "JPEG")
    return file.getvalue()[:100_000]


@pytest.mark.parametrize("picture", [b"\xff\xd8 no picture", b"\x89PNG\r\n\x1a\n" + b"0" * 64, _bomb()])
def test_a_picture_that_is_none_or_too_large_is_refused_by_its_head(server, jpeg, picture_of, text_of, picture) -> None:
    async def main() -> None:
        async with server.viewer() as socket:
            await socket.send(messages.frame_in(0, 0.0, picture))
            assert "cannot be read" in (await text_of(socket, "error"))["message"]
            await socket.send(messages.frame_in(1, 0.0, jpeg))
            assert (await picture_of(socket))[0] == 1

    asyncio.run(main())


def test_ids_must_rise(server, jpeg, text_of) -> None:
    async def main() -> None:
        async with server.viewer() as socket:
            for number in (4, 4):
                await socket.send(messages.frame_in(number, 0.0, jpeg))
            assert "ids must rise" in (await text_of(socket, "error"))["message"]

    asyncio.run(main())


def test_who_goes_on_sending_nonsense_is_shown_out(server) -> None:
    async def main() -> int | None:
        async with server.viewer() as socket:
            with contextlib.suppress(ConnectionClosed):
                for _ in range(100):
                    await socket.send(b"\x77")
                    await socket.recv()
            await asyncio.wait_for(socket.wait_closed(), 30)
            return socket.close_code

    assert asyncio.run(main()) == 1008


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Cookie": "fastdiff=guess"}])
def test_another_page_and_a_guessed_cookie_are_turned_away(server, headers) -> None:
    async def main() -> None:
        with pytest.raises(InvalidStatus):
            async with server.viewer(**headers):
                pass

    asyncio.run(main())


def test_a_name_that_is_not_ours_is_not_answered(server) -> None:
    assert httpx.get(f"http://{server.address}/health", headers={"Host": "evil.example"}).status_code == 421


def test_with_a_password_everything_but_health_needs_it(live_server) -> None:
    with live_server(auth=("ann", "s3cret")) as server:
        health = httpx.get(f"http://{server.address}/health")
        assert health.status_code == 200
        assert "set-cookie" not in health.headers
        assert httpx.get(f"http://{server.address}/metrics").status_code == 401
        assert httpx.get(f"http://{server.address}/metrics", auth=("ann", "wrong")).status_code == 401
        assert server.cookie(auth=("ann", "s3cret")).startswith("fastdiff=")

        async def main(**headers: str) -> str:
            async with server.viewer(**headers) as socket:
                return json.loads(await socket.recv())["type"]

        with pytest.raises(InvalidStatus):
            asyncio.run(main(Cookie="none=1", Authorization="Basic YW5uOnMzY3JldA=="))
        assert asyncio.run(main(Cookie=server.cookie(auth=("ann", "s3cret")))) == "hello"


def test_more_people_than_places_are_told_and_places_come_free(live_server, text_of) -> None:
    async def main(server) -> None:
        async with server.viewer() as first:
            await text_of(first, "hello")
            async with server.viewer() as second:
                found = await text_of(second, "error")
                assert found["fatal"]
                assert "1 people" in found["message"]
        for _ in range(100):
            async with server.viewer() as again:
                if json.loads(await again.recv())["type"] == "hello":
                    return
        raise AssertionError("the place never came free")

    with live_server(max_users=1) as server:
        asyncio.run(main(server))


def test_a_hundred_quick_reconnects_leave_nothing(server, jpeg) -> None:
    async def main() -> None:
        cookie = server.cookie()
        for number in range(100):
            socket = await server.viewer(Cookie=cookie)
            await socket.send(messages.frame_in(number, 0.0, jpeg))
            socket.transport.abort()

    asyncio.run(main())
    for _ in range(600):
        if not server.live.worker.sessions and not server.live.viewers:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert server.live.worker.sessions == []
    assert server.live.viewers == 0


def test_two_viewers_see_their_own_frames_and_settings_only(server, picture_of, text_of) -> None:
    async def main() -> None:
        async with server.viewer() as red, server.viewer() as blue:
            await red.send(json.dumps({"type": "set", "changes": {"prompt": "mine"}}))
            await text_of(red, "settings")
            colours = {0: red, 2: blue}
            for channel, socket in colours.items():
                picture = np.zeros((32, 32, 3), np.uint8)
                picture[..., channel] = 250
                await socket.send(messages.frame_in(channel, 0.0, pictures.encode(picture)))
            for channel, socket in colours.items():
                frame_id, _, _, data = await picture_of(socket)
                assert frame_id == channel
                assert np.asarray(Image.open(io.BytesIO(data))).mean(axis=(0, 1)).argmax() == channel
            prompts = {session.controls.settings.prompt for session in server.live.worker.sessions}
            assert prompts == {"mine", ""}

    asyncio.run(main())


def test_a_condition_is_a_picture_of_the_models_size_whose_scale_moves(server, text_of) -> None:
    large = pictures.encode(np.zeros((300, 400, 3), np.uint8))

    async def main() -> None:
        async with server.viewer() as socket:
            await socket.send(json.dumps({"type": "set", "changes": {"control": {"scale": 0.5}}}))
            assert "send a picture first" in (await text_of(socket, "error"))["message"]
            await socket.send(messages.condition("control", 0.25, large))
            assert (await text_of(socket, "settings"))["changes"] == ["control"]
            session = server.live.worker.sessions[0]
            assert session.controls.settings.control.image.shape == (32, 32, 3)
            assert session.controls.settings.control.scale == 0.25
            await socket.send(json.dumps({"type": "set", "changes": {"control": {"scale": 0.5}}}))
            await text_of(socket, "settings")
            assert session.controls.settings.control.scale == 0.5
            for scale in (7.0, float("nan")):
                await socket.send(messages.condition("control", scale, large))
                assert "scale must be" in (await text_of(socket, "error"))["message"]
            await socket.send(json.dumps({"type": "set", "changes": {"control": None}}))
            await text_of(socket, "settings")
            assert session.controls.settings.control is None

    asyncio.run(main())


def test_blends_and_ramps_come_as_json(server, text_of) -> None:
    async def main() -> None:
        async with server.viewer() as socket:
            hello = await text_of(socket, "hello")
            assert hello["fps"] == 30
            changes = {"prompts": [["a fox", 0.3], ["a wolf", 0.7]], "seeds": [[1, 1], [2, 3]], "strength": 0.8}
            await socket.send(json.dumps({"type": "set", "changes": changes, "seconds": 60}))
            assert (await text_of(socket, "settings"))["version"] == 1
            controls = server.live.worker.sessions[0].controls
            assert controls.settings.prompts == (("a fox", 0.3), ("a wolf", 0.7))
            assert controls.settings.seeds == ((1, 1), (2, 3))
            assert controls.moving
            await socket.send(json.dumps({"type": "set", "changes": {"prompts": [["a fox", -1]]}}))
            assert "prompts must be" in (await text_of(socket, "error"))["message"]

    asyncio.run(main())


def test_a_busy_model_keeps_nobody_from_an_answer(live_server, jpeg, picture_of, text_of) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Busy(IdentityStream):
        def push(self, frame=None, frame_id=None, captured=None):
            began.set()
            assert go_on.wait(60)
            return super().push(frame, frame_id, captured)

    class Model(LiveModel):
        def open(self, scale=1.0, plan=None):
            return Busy(32, 32)

    async def main(server) -> None:
        async with server.viewer() as one, server.viewer() as other, httpx.AsyncClient() as client:
            await one.send(messages.frame_in(0, 0.0, jpeg))
            assert await asyncio.to_thread(began.wait, 60)
            await other.send(json.dumps({"type": "ping", "sent": 7}))
            assert (await text_of(other, "pong"))["sent"] == 7
            assert (await client.get(f"http://{server.address}/health")).json()["ready"]
            go_on.set()
            assert (await picture_of(one))[0] == 0

    with live_server(Model("identity", Settings(""), size=(32, 32))) as server:
        asyncio.run(main(server))


def test_who_never_reads_is_shown_out_and_holds_nobody_up(live_server, jpeg, picture_of, monkeypatch) -> None:
    monkeypatch.setattr("fastdiff_app.live.socket.SEND_TIMEOUT_S", 1.0)
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    heavy = pictures.encode(noise)

    async def main(server) -> None:
        cookie = server.cookie()
        deaf = await server.viewer(Cookie=cookie)
        deaf.transport.pause_reading()
        stuffed = asyncio.create_task(_stuff(deaf, heavy))
        async with server.viewer(Cookie=cookie) as socket:
            for number in range(20):
                await socket.send(messages.frame_in(number, 0.0, heavy))
                assert (await picture_of(socket))[0] == number
            while len(server.live.worker.sessions) > 1:
                await asyncio.sleep(0.05)
        stuffed.cancel()
        deaf.transport.abort()

    with live_server(LiveModel("identity", Settings(""))) as server:
        asyncio.run(main(server))


async def _stuff(socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionClosed):
        for number in range(100_000):
            await socket.send(messages.frame_in(number, 0.0, data))
            await asyncio.sleep(0.02)


def test_health_and_metrics_say_what_the_ledger_knows(server, jpeg, picture_of) -> None:
    async def main() -> str:
        async with server.viewer() as socket:
            await socket.send(messages.frame_in(0, 0.0, jpeg))
            await picture_of(socket)
            await socket.send(messages.painted(0, 5.0, held_back=3))
            async with httpx.AsyncClient() as client:
                while True:
                    text = (await client.get(f"http://{server.address}/metrics")).text
                    if 'fastdiff_frames_shown_total{session="0"} 1.0' in text:
                        return text

    text = asyncio.run(main())
    assert 'fastdiff_frames_dropped_total{cause="window",session="0"} 3.0' in text
    assert 'fastdiff_frames_in_total{session="0"} 4.0' in text
    health = httpx.get(f"http://{server.address}/health").json()
    assert health["ready"]
    assert health["last_frame_age_s"] >= 0


@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=64), st.builds(bytes.__add__, st.sampled_from([b"\x01", b"\x02", b"\x03"]),
                                                    st.binary(max_size=40))))  # fmt: skip
def test_ten_thousand_random_messages_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(Wrong):
        assert isinstance(messages.read(data), messages.FrameIn | messages.Painted | messages.ConditionIn)


@settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "changes", "set"]), inner),
).map(json.dumps)))  # fmt: skip
def test_random_texts_are_read_or_refused(text: str) -> None:
    with contextlib.suppress(Wrong):
        assert messages.read_text(text)["type"] in messages.TEXTS


def test_ten_thousand_random_messages_over_the_wire_leak_no_task_and_end_no_server(server, jpeg, picture_of) -> None:
    rng = np.random.default_rng(0)

    before = server.tasks()

    async def main() -> None:
        cookie, left = server.cookie(), 10_000
        while left:
            async with server.viewer(Cookie=cookie) as socket:
                with contextlib.suppress(ConnectionClosed):
                    while left:
                        left -= 1
                        data = bytes([int(rng.integers(0, 4))]) + rng.bytes(int(rng.integers(0, 40)))
                        await socket.send(data if rng.random() < 0.8 else data.decode("latin-1"))
        async with server.viewer(Cookie=cookie) as socket:
            await socket.send(messages.frame_in(0, 0.0, jpeg))
            assert (await picture_of(socket))[0] == 0

    asyncio.run(main())
    for _ in range(600):
        if server.tasks() <= before and not server.live.viewers:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert server.tasks() <= before
    assert server.live.worker.sessions == []


def test_pictures_are_cut_around_their_centre() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    found = pictures.decode(pictures.encode(wide), 20, 20)
    assert found.shape == (20, 20, 3)
    assert found.min() > 240
