"""`bench fewstep` in small: every row the issue of few steps asks for, on the models as they ship."""

import pytest

import fastdiff
from benchmarks import fewstep
from fastdiff.load import LoadError

ROWS = {"teacher-25": 6, "teacher-4": 8, "student-4": 4, "student-2": 2, "student-1": 1, "agd-25": 3}
SCM = {"scm-2": 2, "scm-1": 1}  # of the transformer alone


@pytest.mark.parametrize("ending", ["", "-dit"])
def test_every_row_is_there_with_its_figures(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    for name, value in {"STEPS": 3, "CAPTIONS": 1, "EACH": 3, "REPEATS": 1}.items():
        monkeypatch.setattr(fewstep, name, value)
    record = fewstep.run(prompts=3, batch=3, models=("mini-dit" if ending else "mini-sd",), clips=0)
    rows = {row.method: row for row in record.rows}
    expected = {f"{name}{ending}": nfe for name, nfe in (ROWS | (SCM if ending else {})).items()}
    assert {name: rows[name].nfe for name in expected} == expected
    for name in expected:
        assert not rows[name].note
        assert {"attribute", "attribute_difference", "mmd2", "diversity"} <= rows[name].quality.keys()
        assert rows[name].quality["attribute"].n == 3
    assert rows[f"teacher-25{ending}"].quality["attribute_difference"].value == 0
    assert "mmd2" in rows["renders"].quality
    assert ("unfolded-25-dit" in rows) == bool(ending)
    if ending:
        assert 0 < rows["unfolded-25-dit"].quality["max_abs_difference"].value < 1e-2


def test_a_model_that_does_not_ship_has_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise LoadError(f"no embedded model {name!r}")

    monkeypatch.setattr(fastdiff, "load", load)
    record = fewstep.run(prompts=3, batch=3, models=("mini-dit",), clips=0)
    assert {row.method for row in record.rows[1:]} == {f"{name}-dit" for name in ROWS | SCM}
    assert all("no embedded model 'mini-dit'" in row.note for row in record.rows[1:])
