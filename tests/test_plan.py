"""Plans: names, overrides, and errors that say what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from medmae.errors import PlanError
from medmae.plan import Plan, apply_override, available_plans, keys_of


@pytest.mark.parametrize("name", sorted(available_plans()))
def test_shipped_plans_are_valid_and_named_as_their_file(name: str) -> None:
    from medmae.models.zoo import check_plan

    plan = Plan.load(name)
    assert plan.name == name
    check_plan(plan)


def test_base_plan_holds_the_published_numbers() -> None:
    plan = Plan.load("bm-mae-base")
    assert plan.modalities == ("t1", "t1c", "t2", "flair")
    assert plan.image.crop == (128, 128, 128)
    assert plan.image.spacing == (1.0, 1.0, 1.0)
    assert (plan.masking.ratio, plan.masking.alpha, plan.masking.sampler) == (0.75, 1.0, "dirichlet")
    network = {key: plan.model[key] for key in ("patch", "width", "depth", "heads", "mlp_width")}
    assert network == {"patch": [16, 16, 16], "width": 768, "depth": 12, "heads": 12, "mlp_width": 1536}
    decoder = [plan.model[f"decoder_{key}"] for key in ("width", "depth", "heads", "mlp_width")]
    assert decoder == [384, 3, 12, 1536]


def test_a_plan_survives_json_and_a_file(tmp_path: Path) -> None:
    plan = Plan.load("bm-mae-base", ["training.lr=0.0003", "image.crop=[96,96,64]"])
    assert Plan.load(json.loads(plan.to_json())) == plan
    file = tmp_path / "mine.json"
    file.write_text(plan.to_json())
    assert Plan.load(file) == plan
    assert Plan.load(str(file)).hash() == plan.hash()


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("training.lr=0.0003", "training", "lr", 0.0003),
        ("training.lr=3e-4", "training", "lr", 0.0003),
        ("training.compile=true", "training", "compile", True),
        ("training.compile=false", "training", "compile", False),
        ("training.clip_norm=null", "training", "clip_norm", None),
        ("training.precision=32", "training", "precision", "32"),
        ("training.precision=bf16", "training", "precision", "bf16"),
        ("image.crop=[64,64,32]", "image", "crop", (64, 64, 32)),
        ("image.spacing=[1, 1, 2.5]", "image", "spacing", (1.0, 1.0, 2.5)),
        ("masking.sampler = uniform", "masking", "sampler", "uniform"),
    ],
)
def test_overrides_have_the_type_of_their_field(override: str, section: str, field: str, value: object) -> None:
    found = getattr(getattr(Plan.load("bm-mae-base", [override]), section), field)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_the_network_and_the_top_level() -> None:
    plan = Plan.load("bm-mae-base", ["model.width=192", 'modalities=["t1","flair"]', "name=mine"])
    assert (plan.model["width"], plan.modalities, plan.name) == (192, ("t1", "flair"), "mine")


def test_later_overrides_win() -> None:
    assert Plan.load("bm-mae-base", ["training.epochs=3", "training.epochs=5"]).training.epochs == 5


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("training.learning_rate=1", "training.lr"),
        ("training.batchsize=1", "training.batch_size"),
        ("trainning.lr=1", "training.lr"),
        ("image.spacin=[1,1,1]", "image.spacing"),
        ("masking.ration=0.5", "masking.ratio"),
    ],
)
def test_misspelt_overrides_suggest_the_nearest_key(override: str, suggestion: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.load("bm-mae-base", [override])
    assert suggestion in str(caught.value)


def test_misspelt_network_key_is_refused_with_the_nearest() -> None:
    from medmae.models.zoo import check_plan

    with pytest.raises(PlanError, match=r"model\.width"):
        check_plan(Plan.load("bm-mae-base", ["model.widht=192"]))


@pytest.mark.parametrize(
    "override",
    [
        "training.lr=fast",
        "training.lr=-1",
        "training.lr=NaN",
        "training.batch_size=0",
        "training.batch_size=1.5",
        "training.compile=maybe",
        "training.precision=16",
        "masking.ratio=1",
        "masking.ratio=0",
        "image.crop=[128,128]",
        "image.crop=[128,128,0]",
        "image.spacing=[1,1,-1]",
        "image.orientation=XYZ",
        "image.orientation=RAR",
        "image.intensity.scheme=window",
        "modalities=[]",
        'modalities=["t1","t1"]',
        "modalities=t1",
    ],
)
def test_bad_values_are_refused_naming_the_field(override: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.load("bm-mae-base", [override])
    leaf = override.partition("=")[0].split(".")[0]
    assert leaf in str(caught.value)


@pytest.mark.parametrize("override", ["training.lr", "=1", "", "training.lr.deeper=1", "training=1", "model.patch.x=1"])
def test_overrides_that_are_not_key_value_are_refused(override: str) -> None:
    with pytest.raises(PlanError):
        Plan.load("bm-mae-base", [override])


def test_every_problem_of_a_plan_is_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.load("bm-mae-base", ["training.lr=-1", "masking.ratio=2", "image.crop=[0,1,1]"])
    told = " ".join(str(problem) for problem in caught.value.problems)
    assert all(key in told for key in ("training.lr", "masking.ratio", "image"))


def test_unknown_keys_in_a_file_suggest_the_nearest(tmp_path: Path) -> None:
    data = json.loads(Plan.load("bm-mae-base").to_json())
    data["training"]["learnig_rate"] = 1
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(file)
    assert "training.learnig_rate" in str(caught.value)
    assert str(file) in str(caught.value)


def test_unknown_plans_suggest_the_nearest() -> None:
    with pytest.raises(PlanError, match="bm-mae-base"):
        Plan.load("bm-mae-bas")


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff\xfe", ""])
def test_files_that_are_no_plan_are_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"broken\.json"):
        Plan.load(file)


def test_loading_changes_nothing_given() -> None:
    data = json.loads(Plan.load("bm-mae-base").to_json())
    before = json.dumps(data)
    Plan.load(data, ["training.lr=1", "model.width=3"])
    assert json.dumps(data) == before


def test_hash_changes_with_any_field() -> None:
    plan = Plan.load("bm-mae-base")
    others = ["training.lr=0.0002", "model.width=32", "reconstruction.shifts=1", "image.crop=[64,64,64]", "name=x"]
    hashes = {plan.hash(), *(Plan.load(plan, [override]).hash() for override in others)}
    assert len(hashes) == len(others) + 1
    assert Plan.load("bm-mae-base").hash() == plan.hash()


def test_override_of_a_section_that_a_plan_leaves_out() -> None:
    data: dict[str, object] = {"name": "small", "method": "bm-mae", "modalities": ["t1"]}
    apply_override(data, "image.intensity.scheme=none")
    assert Plan.load(data).image.intensity.scheme == "none"


def test_keys_of_lists_sections_and_leaves() -> None:
    class Inner(BaseModel):
        leaf: int = 1

    class Outer(BaseModel):
        inner: Inner = Inner()
        other: int = 2

    assert keys_of(Outer) == ["inner", "inner.leaf", "other"]
