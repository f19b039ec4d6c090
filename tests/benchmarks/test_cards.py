"""The cards of shipped students carry what was measured of them, once however often they are written."""

import pytest

from benchmarks import more_cards
from benchmarks.record import Record, Row
from fastdiff.miniature import wan
from fastdiff.quality import Interval


def measured(tmp_path, name, methods):
    rows = [Row(method, 1.0, nfe=4, quality={"attribute": Interval(0.9, 0.8, 1.0, 8)}) for method in methods]
    Record(name, rows).save(tmp_path / f"{name}.json")


def test_figures_stand_in_a_card_once(tmp_path):
    measured(tmp_path, "fewstep", ["teacher-25", "teacher-4", "student-4", "student-1"])
    card = tmp_path / "mini-sd" / "four-step" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("# A student\n\nDistilled.\n", "utf-8")
    more_cards.students(tmp_path, tmp_path)
    first = card.read_text("utf-8")
    more_cards.students(tmp_path, tmp_path)
    assert card.read_text("utf-8") == first
    assert first.startswith("# A student\n\nDistilled.\n\n## How well it does\n")
    assert "| student-4 | 1 |" in first
    assert "student-1 " not in first
    assert not (tmp_path / "mini-sd" / "one-step").exists()


def test_a_lora_without_a_card_gets_one(tmp_path):
    measured(tmp_path, "moving", ["mini-wan", "rollout", "rollout-student"])
    (tmp_path / "mini-wan" / "rollout").mkdir(parents=True)
    more_cards.students(tmp_path, tmp_path)
    text = (tmp_path / "mini-wan" / "rollout" / "README.md").read_text("utf-8")
    assert "mini-wan-student" in text
    assert "| rollout-student |" in text


def test_every_shipped_student_has_its_place():
    shipped = {str(card.parent.relative_to(more_cards.STUDENTS)) for card in more_cards.STUDENTS.rglob("*.safetensors")}
    assert shipped
    assert shipped <= set(more_cards.SHOWN)


@pytest.mark.slow
def test_the_sheet_shows_every_fourth_frame():
    pipe = wan.untrained()
    pipe.set_progress_bar_config(disable=True)
    sheet = more_cards.clips(pipe, count=2)
    assert sheet.height == 2 * (3 * wan.SIZE + 6) + 6
