"""Ids, seeds and job files (points 1, 2, 6, 13 of the contract of batch jobs)."""

import json
import os
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_pipelines.batch.errors import JobError
from fastdiff_pipelines.batch.identity import folder_digest, resolve_model
from fastdiff_pipelines.batch.items import (
    Adapter,
    Common,
    Item,
    derived_seed,
    digest,
    file_name,
    from_row,
    identity,
    to_row,
    with_seeds,
)
from fastdiff_pipelines.batch.reading import read_jobs
from fastdiff_pipelines.batch.settings import Settings, Work

COMMON = Common("model@1", '{"schema": 1}', "float32", "png")
ITEM = Item("a red circle", "blur", 3, 64, 128, 20, 5.0, adapters=(Adapter("a.safetensors", 0.5, "abc"),))


def test_id_is_the_digest_of_the_canonical_content() -> None:
    fields = dict(prompt="p", negative="", height=None, width=None, steps=25, guidance=5.0, frames=None, fps=8)
    whole = {**fields, "adapters": [], "seed": 1, **asdict(COMMON)}
    assert identity(Item("p", seed=1), COMMON) == digest(whole)
    assert digest({"b": 1, "a": [1.5, "é"]}) == digest({"a": [1.5, "é"], "b": 1})


@pytest.mark.parametrize(
    "other",
    [
        replace(ITEM, prompt="a blue circle"),
        replace(ITEM, negative=""),
        replace(ITEM, seed=4),
        replace(ITEM, height=128),
        replace(ITEM, steps=21),
        replace(ITEM, guidance=5.5),
        replace(ITEM, frames=4),
        replace(ITEM, adapters=()),
        replace(ITEM, adapters=(Adapter("a.safetensors", 0.6, "abc"),)),
        replace(ITEM, adapters=(Adapter("a.safetensors", 0.5, "abd"),)),
    ],
)
def test_id_changes_with_everything_an_output_depends_on(other: Item) -> None:
    assert identity(other, COMMON) != identity(ITEM, COMMON)


def test_id_changes_with_model_plan_precision_and_format() -> None:
    others = [replace(COMMON, **{name: "webp"}) for name in ("model", "plan", "dtype", "format")]
    assert len({identity(ITEM, common) for common in (COMMON, *others)}) == 5


def test_id_does_not_depend_on_where_an_adapter_lies() -> None:
    moved = replace(ITEM, adapters=(Adapter("elsewhere/a.safetensors", 0.5, "abc"),))
    assert identity(moved, COMMON) == identity(ITEM, COMMON)


def test_derived_seeds_are_known_values() -> None:
    item = Item("a red circle")
    expected = int(digest(9, item.content(), 0)[:16], 16) // 2
    assert derived_seed(9, item, 0) == expected
    assert 0 <= expected < 2**63


@given(st.permutations(range(6)))
def test_seeds_do_not_depend_on_the_order_of_different_items(order: list[int]) -> None:
    items = [Item(f"prompt {number}") for number in range(6)]
    expected = {item.prompt: item.seed for item in with_seeds(items, 1)}
    shuffled = with_seeds([items[place] for place in order], 1)
    assert {item.prompt: item.seed for item in shuffled} == expected


def test_asking_twice_gives_two_pictures_and_naming_a_seed_twice_gives_one() -> None:
    twice = with_seeds([Item("p"), Item("p")], 1)
    assert twice[0].seed != twice[1].seed
    named = with_seeds([Item("p", seed=5), Item("p", seed=5)], 1)
    settings = Settings("nowhere", COMMON)
    assert len(Work.of(settings, twice).items) == 2
    assert len(Work.of(settings, named).items) == 1


def test_seeds_do_not_depend_on_model_or_plan() -> None:
    assert with_seeds([Item("p")], 1)[0].seed == with_seeds([Item("p"), Item("q")], 1)[0].seed
    assert with_seeds([Item("p")], 1)[0].seed != with_seeds([Item("p")], 2)[0].seed


def test_work_is_sorted_so_that_equal_buckets_are_neighbours_and_adapters_change_least() -> None:
    lora = (Adapter("a", 1.0, "x"),)
    kinds = [dict(), dict(height=64, width=64), dict(adapters=lora), dict(adapters=lora, steps=4)]
    items = with_seeds([Item(f"p{number}", **kinds[number % 4]) for number in range(16)], 0)
    ordered = list(Work.of(Settings("nowhere", COMMON), items).items.values())
    buckets = [item.bucket for item in ordered]
    assert len([1 for one, other in pairwise(buckets) if one != other]) == 3
    adapters = [item.adapters for item in ordered]
    assert len([1 for one, other in pairwise(adapters) if one != other]) == 1


def test_work_survives_the_trip_through_its_file(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    odd = Item('line\nend, "quotes" and ünïcode \u2028', seed=2**63 - 1)
    work = Work.of(Settings("nowhere", COMMON, devices=("cuda:0", "cuda:1")), [ITEM, odd])
    assert Work.load(work.save(tmp_path)) == work
    assert from_row(json.loads(json.dumps(to_row(ITEM)))) == ITEM


def test_file_names_are_plain_and_carry_the_id() -> None:
    assert (
        file_name(Item("../../etc: A *Red* Circle!"), "0123456789abcdef99", "png")
        == "etc-a-red-circle-0123456789abcdef.png"
    )
    assert file_name(Item("赤い円"), "0123456789abcdef99", "jpg") == "output-0123456789abcdef.jpg"
    assert len(file_name(Item("x" * 5000), "0" * 64, "png")) < 80


def test_three_kinds_of_files_ask_for_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,seed,size,negative\n"red, round",4,128x64,\nblue,,,blur\n', "utf-8-sig")
    rows = ['{"prompt": "red, round", "seed": 4, "size": "128x64"}', "", '{"prompt": "blue", "negative": "blur"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "a.txt").write_text(f"# two pictures\n{rows[0]}\nblue\n")
    from_csv, from_json, from_text = (read_jobs(tmp_path / f"a.{kind}") for kind in ("csv", "jsonl", "txt"))
    expected = (Item("red, round", seed=4, height=64, width=128), Item("blue", negative="blur"))
    assert from_csv.items == from_json.items == expected
    assert from_text.items == (expected[0], Item("blue"))
    assert (from_csv.lines, from_json.lines, from_text.lines) == ((2, 3), (1, 3), (2, 3))
    assert not (from_csv.problems or from_json.problems or from_text.problems)


def test_count_gives_copies_with_their_own_noise(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "count": 3}\n{"prompt": "q", "count": 3, "seed": 10}')
    items = with_seeds(read_jobs(path).items, 0)
    assert len({item.seed for item in items[:3]}) == 3
    assert [item.seed for item in items[3:]] == [10, 11, 12]


def test_adapters_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"weights")
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "p", "adapters": [{"path": "one.safetensors", "scale": 0.5}]}')
    (tmp_path / "jobs.csv").write_text("prompt,adapters\np,one.safetensors:0.5\n")
    (tmp_path / "bad.csv").write_text("prompt,adapters\np,none.safetensors\n")
    first, second = (read_jobs(tmp_path / f"jobs.{kind}").items[0] for kind in ("jsonl", "csv"))
    assert first == second
    assert first.adapters[0].scale == 0.5
    before = identity(first, COMMON)
    (tmp_path / "one.safetensors").write_bytes(b"changed")
    assert identity(read_jobs(tmp_path / "jobs.csv").items[0], COMMON) != before
    assert "no adapter at" in read_jobs(tmp_path / "bad.csv").problems[0]


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ('{"prompt": "a"}\n{"prompt": "cut of', "jsonl", "cut off"),
        ('{"prompt": "a"}\nplain words', "jsonl", "not JSON"),
        ('{"prompt": "a"}\n["a"]', "jsonl", "not an object"),
        ('{"prompt": "a"}\n{"steps": 3}', "jsonl", "no prompt"),
        ('{"prompt": "a"}\n{"prompt": " "}', "jsonl", "empty"),
        ('{"prompt": "a"}\n{"prompt": 4}', "jsonl", "not text"),
        ('{"prompt": "a"}\n{"prompt": "b", "stpes": 3}', "jsonl", "unknown key 'stpes'"),
        ('{"prompt": "a"}\n{"prompt": "b", "steps": 0}', "jsonl", "steps must be from 1"),
        ('{"prompt": "a"}\n{"prompt": "b", "steps": 2.5}', "jsonl", "not a whole number"),
        ('{"prompt": "a"}\n{"prompt": "b", "steps": true}', "jsonl", "not a whole number"),
        ('{"prompt": "a"}\n{"prompt": "b", "guidance": NaN}', "jsonl", "guidance must be"),
        ('{"prompt": "a"}\n{"prompt": "b", "size": "-64"}', "jsonl", "not a size"),
        ('{"prompt": "a"}\n{"prompt": "b", "height": -64, "width": 64}', "jsonl", "each side"),
        ('{"prompt": "a"}\n{"prompt": "b", "height": 64}', "jsonl", "come together"),
        ('{"prompt": "a"}\n{"prompt": "b", "seed": -1}', "jsonl", "seed must be"),
        ('{"prompt": "a"}\n{"prompt": "b", "count": 0.5}', "jsonl", "whole number"),
        ('{"prompt": "a"}\n{"prompt": "\\ud800"}', "jsonl", "surrogate"),
        ("prompt,seed\na,1\nb", "csv", "cut off"),
        ('prompt,seed\na,1\n"b', "csv", "cut off"),
        ("prompt,seed\na,1\nb,x", "csv", "seed cannot be"),
    ],
)
def test_a_bad_line_costs_only_itself(tmp_path: Path, text: str, kind: str, problem: str) -> None:
    path = tmp_path / f"jobs.{kind}"
    path.write_text(text)
    jobs = read_jobs(path)
    assert [item.prompt for item in jobs.items] == ["a"]
    assert len(jobs.problems) == 1
    assert problem in jobs.problems[0]
    assert jobs.problems[0].startswith(f"{path}:{3 if kind == 'csv' else 2}: ")


@pytest.mark.parametrize("data", [b"", b"\n# nothing\n", b"\xff\xfe\x00bad"])
def test_a_file_without_jobs_is_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "jobs.txt").write_bytes(data)
    with pytest.raises(JobError, match="jobs"):
        read_jobs(tmp_path / "jobs.txt")
    with pytest.raises(JobError, match="cannot read"):
        read_jobs(tmp_path / "missing.txt")


def test_a_model_is_what_is_in_its_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "unet" / "weights.safetensors").write_bytes(bytes(1000))
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")
    assert resolve_model(str(tmp_path / "one"))[1].startswith("one@")
    (tmp_path / "two" / "unet" / "weights.safetensors").write_bytes(bytes(999) + b"x")
    assert folder_digest(tmp_path / "one") != folder_digest(tmp_path / "two")
    os.remove(tmp_path / "two" / "model_index.json")
    for wrong in (str(tmp_path / "two"), str(tmp_path / "three"), "nobody"):
        with pytest.raises(JobError, match="model"):
            resolve_model(wrong)
