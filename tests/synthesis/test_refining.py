"""``medmae finetune synthesis``: better than what it began with, resumable, and used wherever the checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import medmae
from medmae.cohort.prepared import Cohort
from medmae.errors import CheckpointError, InputError
from medmae.imaging.nifti import read_image, write_nifti
from medmae.models.refiner import pattern
from medmae.plan import Plan
from medmae.synthesis.evaluate import score_study
from medmae.synthesis.familiar import LIMIT, InMemory, strangeness
from medmae.synthesis.refining import Coarse, samples_of
from tests.training.conftest import PLAN, write_scans

SET = ["width=8", "levels=2", "crop=[16,16,16]", "epochs=4", "steps_per_epoch=20", "batch_size=2", "combinations=3"]
SET += ["validation_share=0.3", "lr=0.003"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scans, a run pre-trained on them, and the same refined."""
    root = tmp_path_factory.mktemp("refining")
    scans = write_scans(root / "scans", studies=10)
    plan = Plan.load({**PLAN, "reconstruction": {"overlap": 0.25, "shifts": 2}})
    medmae.pretrain(scans, plan, root / "run", max_steps=30, device="cpu", progress=False)
    medmae.finetune_synthesis(scans, root / "run", root / "refined", overrides=SET, device="cpu", progress=False)
    return {name: root / name for name in ("scans", "run", "refined")}


def test_refining_brings_the_synthesis_nearer_to_the_truth(places: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (places["refined"] / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_l1" in line][-1]
    assert last["validation_l1"] < 0.8 * last["validation_coarse"]
    assert (places["refined"] / "previews" / "step-0000080.png").exists()


def test_the_model_itself_stays_and_loads_with_its_refiner(places: dict[str, Path]) -> None:
    before, after = (load_file(places[n] / "checkpoint" / "model.safetensors") for n in ("run", "refined"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    model = medmae.load(places["refined"])
    assert set(model.companions) == {"refiner", "familiar"} and "refiner" not in model.state_dict()
    state = torch.load(places["refined"] / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["step"] == 80


def test_a_resumed_run_is_an_uninterrupted_one(places: dict[str, Path], tmp_path: Path) -> None:
    options = {"overrides": SET, "device": "cpu", "progress": False}
    stopped = medmae.finetune_synthesis(places["scans"], places["run"], tmp_path / "r", max_steps=40, **options)
    assert stopped.steps == 40
    medmae.finetune_synthesis(places["scans"], places["run"], tmp_path / "r", resume=True, **options)
    one, two = (load_file(p / "checkpoint" / "refiner.safetensors") for p in (places["refined"], tmp_path / "r"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(CheckpointError, match="seed"):
        medmae.finetune_synthesis(places["scans"], places["run"], tmp_path / "r", resume=True, seed=3, **options)


def test_the_blend_is_least_squares_on_what_is_given_and_predicted(places: dict[str, Path]) -> None:
    from sklearn.linear_model import LinearRegression

    model = medmae.load(places["refined"])
    plan = Plan.load(json.loads((places["refined"] / "plan.json").read_text()))
    cohort = Cohort.open(places["refined"] / "cohort")
    held = json.loads((places["refined"] / "split.json").read_text())["validation"]
    samples = samples_of([s for s in cohort.studies if s.id not in held], model, plan.refining, 0)
    (kept,) = (places["refined"] / "coarse").iterdir()
    coarse = Coarse(kept.parent, model, kept.name)
    shown = samples[0].shown
    target = next(m for m in samples[0].study.modalities if m not in shown)
    rows, truths = [], []
    for sample in samples:
        if sample.shown == shown and target in sample.study.modalities:
            found = coarse.crop(sample, (0, 0, 0), sample.study.shape)
            inside = found["inside"]
            rows.append(np.stack([found["values"][model.modalities.index(m)][inside] for m in (*shown, target)], 1))
            truths.append(found["truth"][model.modalities.index(target)][inside])
    fitted = LinearRegression().fit(np.concatenate(rows), np.concatenate(truths))
    refiner = model.companions["refiner"]
    number = int(pattern(torch.tensor([[m in shown for m in model.modalities]])))
    row = refiner.blend[number, model.modalities.index(target)].numpy()
    mine = [row[model.modalities.index(m)] for m in (*shown, target)]
    assert np.allclose([*mine, row[-1]], [*fitted.coef_, fitted.intercept_], atol=0.1)  # but for the ridge
    assert row[[m not in (*shown, target) for m in model.modalities] + [False]].tolist() == [0.0] * (3 - len(shown))


def test_the_weights_that_did_best_stay(places: dict[str, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (places["refined"] / "metrics.jsonl").read_text().splitlines()]
    seen = {
        line["step"]: line["validation_l1"] + 0.5 * line["validation_ssim"] for line in lines if "validation_l1" in line
    }
    facts = json.loads((places["refined"] / "checkpoint" / "metadata.json").read_text())["refiner"]
    assert facts["best_step"] == min(seen, key=seen.__getitem__) and len(seen) == 4
    options = {"device": "cpu", "progress": False, "max_steps": 20}
    harmed = medmae.finetune_synthesis(  # a rate that ruins it: what it began with is better, and it says so
        places["scans"], places["run"], tmp_path / "r", overrides=[*SET, "lr=0.3"], **options
    )
    facts = json.loads((tmp_path / "r" / "checkpoint" / "metadata.json").read_text())["refiner"]
    assert facts["best_step"] == 0 and not harmed.problems
    weights = load_file(tmp_path / "r" / "checkpoint" / "refiner.safetensors")
    assert not weights["correction.weight"].any() and weights["blend"].any()
    assert harmed.metrics["validation_l1"] < harmed.metrics["validation_coarse"]  # the blend's doing


def test_a_refiner_can_begin_with_anothers(places: dict[str, Path], tmp_path: Path) -> None:
    options = {"device": "cpu", "progress": False}
    begun = medmae.finetune_synthesis(
        *(places["scans"], places["run"], tmp_path / "r"),
        overrides=[*SET, "lr=1e-30"],
        init=places["refined"],
        **options,
    )
    one, two = (load_file(p / "checkpoint" / "refiner.safetensors") for p in (places["refined"], tmp_path / "r"))
    assert all(torch.equal(one[k], two[k]) for k in one) and begun.metrics["validation_l1"] > 0
    for init, overrides in ((places["run"], SET), (places["refined"], [*SET, "width=4"])):
        with pytest.raises(CheckpointError, match="modalities, width, levels"):
            medmae.finetune_synthesis(
                *(places["scans"], places["run"], tmp_path / "x"), overrides=overrides, init=init, **options
            )


def test_a_refiner_that_was_changed_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(places["refined"], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-previous"))
    file = copy / "checkpoint" / "refiner.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="refiner"):
        medmae.load(copy)


def test_reconstruct_writes_the_uncertainty_with_its_mark(places: dict[str, Path], tmp_path: Path) -> None:
    study = places["scans"] / "case0"
    result = medmae.reconstruct(study, places["refined"], tmp_path, targets=["flair"], device="cpu")
    assert [p.name for p in result.written] == ["case0_flair_uncertainty.nii.gz", "case0_flair.nii.gz"]
    width, image = (read_image(tmp_path / f"case0_flair{end}.nii.gz") for end in ("_uncertainty", ""))
    assert width.grid == image.grid and width.array.min() == 0 < width.array.max()
    assert ((image.array == 0) >= (width.array == 0)).mean() > 0.99
    car = json.loads((tmp_path / "case0_flair.json").read_text())
    assert car["inference"]["refined"] and car["uncertainty"]["level"] == 0.9 and "refiner_hash" in car["checkpoint"]
    assert 0.5 < car["uncertainty"]["coverage_of_subjects_left_out"] <= 1
    beside = json.loads((tmp_path / "case0_flair_uncertainty.json").read_text())
    assert beside["synthetic"] is True and beside["kind"] == "uncertainty"
    plain = medmae.reconstruct(
        study, places["refined"], tmp_path / "plain", targets=["flair"], device="cpu", uncertainty=False
    )
    assert [p.name for p in plain.written] == ["case0_flair.nii.gz"]
    assert np.array_equal(read_image(plain.written[0]).array, image.array)


def test_a_run_that_was_never_calibrated_gives_no_interval(places: dict[str, Path], tmp_path: Path) -> None:
    result = medmae.reconstruct(places["scans"] / "case0", places["run"], tmp_path, targets=["flair"], device="cpu")
    assert [p.name for p in result.written] == ["case0_flair.nii.gz"]


def test_a_heat_map_of_a_study_that_lacks_nothing(places: dict[str, Path], tmp_path: Path) -> None:
    result = medmae.reconstruct(places["scans"] / "case0", places["run"], tmp_path, anomaly=True, device="cpu")
    assert [p.name for p in result.written] == ["case0_anomaly.nii.gz"] and not result.skipped
    found = read_image(result.written[0])
    assert 0.3 < np.median(found.array[found.array > 0]) < 3
    car = json.loads((tmp_path / "case0_anomaly.json").read_text())
    assert car["kind"] == "anomaly" and set(car["sources"]) == {"t1", "t1c", "t2", "flair"}


def test_a_strange_image_is_warned_of_and_a_usual_one_is_not(places: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("t1", "t2"):
        source = read_image(places["scans"] / "case3" / f"{name}.nii.gz")
        (tmp_path / "usual").mkdir(exist_ok=True)
        (tmp_path / "strange").mkdir(exist_ok=True)
        write_nifti(source, tmp_path / "usual" / f"{name}.nii.gz")
        noise = source.with_array((rng.exponential(100, source.shape) * (source.array != 0)).astype(np.float32))
        write_nifti(noise if name == "t2" else source, tmp_path / "strange" / f"{name}.nii.gz")
    run = places["refined"]
    result = medmae.reconstruct(
        [tmp_path / "usual", tmp_path / "strange"], run, tmp_path / "o", targets=["flair"], device="cpu"
    )
    assert [(w.where, w.field) for w in result.warnings] == [("strange", "t2")]
    car = json.loads((tmp_path / "o" / "strange_flair.json").read_text())
    assert car["distance_from_training"]["t2"] > LIMIT >= car["distance_from_training"]["t1"]


def test_a_training_image_is_at_no_distance(places: dict[str, Path]) -> None:
    model = medmae.load(places["refined"])
    cohort = medmae.Cohort.open(places["refined"] / "cohort")
    split = json.loads((places["refined"] / "split.json").read_text())
    study = next(s for s in cohort.studies if s.id in split["training"])
    arrays = {m: study.array(m).astype(np.float32) for m in study.modalities}
    found = strangeness(model, InMemory(study.id, arrays, study.affine), "cpu")
    assert found and all(v < 0.01 for v in found.values())
    assert not set(split["training"]) & set(split["validation"])


def test_an_evaluation_says_how_often_the_truth_lies_within(places: dict[str, Path]) -> None:
    model = medmae.load(places["refined"])
    study = medmae.Cohort.open(places["refined"] / "cohort").studies[0]
    rows = list(score_study(study, model, ["flair"], None, "seg", torch.device("cpu")))
    assert rows and all(0 <= row["coverage"] <= 1 and row["width"] > 0 for row in rows)


def test_what_cannot_be_refined_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    one = {**PLAN, "modalities": ["t2"]}
    medmae.pretrain(places["scans"], Plan.load(one), tmp_path / "one", max_steps=1, device="cpu", progress=False)
    with pytest.raises(CheckpointError, match="one modality"):
        medmae.finetune_synthesis(places["scans"], tmp_path / "one", tmp_path / "o", device="cpu", progress=False)
    alone = tmp_path / "alone"
    for case in range(3):
        (alone / f"case{case}").mkdir(parents=True)
        (alone / f"case{case}" / "t2.nii.gz").write_bytes((places["scans"] / "case0" / "t2.nii.gz").read_bytes())
    with pytest.raises(InputError, match="two of the model's modalities"):
        medmae.finetune_synthesis(alone, places["run"], tmp_path / "p", overrides=SET, device="cpu", progress=False)
