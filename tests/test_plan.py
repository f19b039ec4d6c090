"""Plans: order, equality, JSON there and back, and one clear error for everything that is not a plan."""

import json
import subprocess
import sys

import pytest

import fastdiff
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.plan import MEMBERS, PRESETS, Plan, PlanError, member
from fastdiff.runtime.compile import Compile
from fastdiff.runtime.precision import Precision
from fastdiff.runtime.prompt_cache import PromptCache
from fastdiff.runtime.tiny_decoder import TinyDecoder

FULL = Plan([Precision("bfloat16"), DiffusersCache(threshold=0.1), PromptCache(2**20), Compile(shapes=((64, 96),))])


def test_a_plan_survives_json_and_stays_equal_and_hashable(tmp_path):
    again = Plan.from_json(FULL.to_json())
    assert again == FULL
    assert hash(again) == hash(FULL)
    assert again.accelerations[3].settings()["shapes"] == ((64, 96),)
    FULL.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == FULL


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str):
    plan = Plan.preset(name)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.name == name


def test_presets_hold_what_they_promise():
    kinds = {name: [type(one).__name__ for one in Plan.preset(name)] for name in PRESETS}
    assert kinds["exact"] == ["Precision", "PromptCache", "Compile"]
    assert kinds["balanced"] == ["Precision", "DiffusersCache", "PromptCache", "Compile"]
    assert kinds["fast"] == ["TinyDecoder", *kinds["balanced"]]
    assert all(one.exact for one in Plan.preset("exact"))


def test_a_wrong_order_raises_and_prints_the_right_one():
    with pytest.raises(PlanError, match=r"Precision \(weights\), PromptCache \(steps\), Compile \(compile\)"):
        Plan([Compile(), PromptCache(), Precision()])


def test_a_kind_stands_once():
    with pytest.raises(PlanError, match="PromptCache stands twice"):
        Plan([PromptCache(), PromptCache(1)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a plan"),
        ('{"schema": 2, "accelerations": []}', "reads schema 1; upgrade fastdiff"),
        ('{"schema": 1, "accelerations": [], "x": 1}', "unknown key 'x'"),
        ('{"schema": 1, "accelerations": [{}]}', 'object with a "kind"'),
        ('{"schema": 1, "accelerations": [{"kind": "Warp"}]}', "no acceleration is called 'Warp'; known are"),
        ('{"schema": 1, "accelerations": [{"kind": "PromptCache", "size": 1}]}', "no setting 'size'"),
        ('{"schema": 1, "accelerations": [{"kind": "DiffusersCache", "threshold": NaN}]}', "NaN"),
        ('{"schema": 1, "accelerations": [{"kind": "DiffusersCache", "threshold": "high"}]}', "must be a number"),
        ('{"schema": 1, "accelerations": [{"kind": "Precision", "dtype": "int3"}]}', "use one of None, 'keep'"),
    ],
)
def test_what_is_not_a_plan_gives_one_clear_error(text: str, message: str):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_a_plan_file_that_is_missing_or_bad_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(PlanError, match=r"bad\.json: not a plan"):
        Plan.load(tmp_path / "bad.json")


def test_an_object_in_a_plan_cannot_go_into_a_file():
    class Decoder:
        def decode(self): ...

    with pytest.raises(PlanError, match="use a path or a name"):
        Plan([TinyDecoder(Decoder())]).to_json()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiffusersCache(threshold=float("nan")),
        lambda: DiffusersCache(threshold=-1),
        lambda: DiffusersCache(interval=0),
        lambda: member("DiffusersCache")(interval=1.5),
        lambda: DiffusersCache(method="tea"),
        lambda: DiffusersCache(method="mag"),
        lambda: Precision("float8"),
        lambda: Precision(components=("text",)),
        lambda: PromptCache(0),
        lambda: member("Compile")(shapes=((64,),)),
        lambda: Compile(backend="eager", mode="max-autotune"),
        lambda: TinyDecoder(7),
    ],
)
def test_settings_are_checked_on_construction(make):
    with pytest.raises(ValueError, match=r"^[A-Z]\w+: "):
        make()


@pytest.mark.parametrize("kind", MEMBERS)
def test_every_member_is_a_frozen_value_with_plain_settings(kind: str):
    one = member(kind)()
    assert one == member(kind)()
    assert hash(one) == hash(member(kind)())
    assert json.loads(json.dumps(one.settings())) is not None
    with pytest.raises(AttributeError):
        one.stage_of_life = 1


def test_importing_is_cheap_and_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None\n"
        "import fastdiff\n"
        "assert all(hasattr(fastdiff, name) for name in fastdiff.__all__)\n"
        "fastdiff.Plan([])\n"
        "try: fastdiff.load()\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "fastdiff[cpu]"' in done.stdout


def test_the_public_names_are_pinned():
    assert fastdiff.__all__ == ["Acceleration", "Plan", "Unsupported", "Verdict", "accelerate", "audit", "load"]
