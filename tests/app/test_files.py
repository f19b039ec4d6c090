"""Pictures, videos and other files: read whole or refused in one line, written whole or not at all."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fastdiff_app import images, outputs, video
from fastdiff_app.failures import ExitCode, Failure
from fastdiff_app.sheet import MARGIN, TEXT, contact_sheet


def _frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright bar that moves, on gray."""
    frames = np.full((count, height, width, 3), 90, np.uint8)
    for index in range(count):
        frames[index, :, 2 * index : 2 * index + 12] = (230, 60, 40)
    return frames


def test_video_survives_a_trip_through_a_file(tmp_path: Path) -> None:
    frames = _frames(9)
    path = tmp_path / "clip.mp4"
    video.write_video(path, frames, fps=12)
    source = video.VideoSource(path)
    assert (source.fps, source.frames, source.height, source.width) == (Fraction(12), 9, 48, 64)
    back = np.stack(list(source.read(48, 64)))
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 4


def test_odd_sides_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    video.write_video(path, _frames(2, 33, 47), fps=5)
    source = video.VideoSource(path)
    assert (source.height, source.width) == (33, 47)


def test_frames_are_cut_and_not_stretched(tmp_path: Path) -> None:
    wide = np.zeros((1, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 200
    path = tmp_path / "wide.mp4"
    video.write_video(path, wide, fps=5)
    (middle,) = video.VideoSource(path).read(32, 32)
    assert middle[:, 4:-4].mean() == pytest.approx(200, abs=4)


def test_no_video_is_left_when_the_work_fails(tmp_path: Path) -> None:
    def half() -> None:
        with video.video_sink(tmp_path / "clip.mp4", Fraction(5), 16, 16) as write:
            write(np.zeros((16, 16, 3), np.uint8))
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_frames_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no frame") as caught, video.video_sink(tmp_path / "a.mp4", Fraction(5), 16, 16):
        pass
    assert caught.value.code == ExitCode.INPUT
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half() -> None:
        with outputs.whole_file(path) as part:
            part.write_text("ne")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        half()
    assert path.read_text() == "old"
    outputs.write_json(path, {"new": [1]})
    assert json.loads(path.read_text()) == {"new": [1]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such video"), (b"", "not a video"), (b"these are words\n" * 99, "not a video")]
)
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure, match=reason) as caught:
        video.VideoSource(path)
    assert caught.value.code == ExitCode.INPUT
    assert "\n" not in str(caught.value)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(Failure, match="holds no video"):
        video.VideoSource(path)


def test_a_truncated_video_gives_the_frames_it_still_has(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    video.write_video(path, np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8), fps=10)
    path.write_bytes(path.read_bytes()[:60000])
    assert 0 < len(list(video.VideoSource(path).read(64, 64))) < 30


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("64", (64, 64)), ("768x512", (512, 768)), ("96X64", (64, 96))]
)
def test_sizes_are_width_by_height(text: str | None, size: tuple[int, int] | None) -> None:
    assert images.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "0", "65", "-64", "8", "100000", "64x64x64", "6 4", "٦٤٠"])
def test_absurd_sizes_are_refused(text: str) -> None:
    with pytest.raises(Failure) as caught:
        images.parse_size(text)
    assert caught.value.code == ExitCode.USAGE


def test_pictures_carry_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    images.write_image(path, picture, {"prompt": "a red circle", "seed": 3})
    with Image.open(path) as back:
        assert back.info == {"prompt": "a red circle", "seed": "3"}
    np.testing.assert_array_equal(np.asarray(images.read_image(path)), picture)


@pytest.mark.parametrize("content", [None, b"", b"GIF89a and then nothing"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure) as caught:
        images.read_image(path)
    assert caught.value.code == ExitCode.INPUT


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, code in (
        (tmp_path / "file" / "a.png", ExitCode.OUTPUT),
        (tmp_path, ExitCode.USAGE),
        (tmp_path / "a.exe", ExitCode.USAGE),
    ):
        with pytest.raises(Failure) as caught:
            outputs.check_writable(path, images.SUFFIXES)
        assert caught.value.code == code
    outputs.check_writable(tmp_path / "new" / "a.png", images.SUFFIXES)
    assert list((tmp_path / "new").iterdir()) == []


def test_contact_sheet_puts_each_picture_in_its_place() -> None:
    red, blue = (np.full((16, 16, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = np.asarray(contact_sheet([("first", [red, None]), ("second", [None, blue])], tile=32))
    line = TEXT + MARGIN
    first, second = MARGIN + line, MARGIN + line + 32 + MARGIN + line
    np.testing.assert_array_equal(sheet[first : first + 32, MARGIN : MARGIN + 32], np.full((32, 32, 3), (255, 0, 0)))
    right = MARGIN + 32 + MARGIN
    np.testing.assert_array_equal(sheet[second : second + 32, right : right + 32], np.full((32, 32, 3), (0, 0, 255)))
    assert (sheet[first : first + 32, right : right + 32] == 255).all()
