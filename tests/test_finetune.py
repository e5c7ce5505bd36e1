"""Heads on encoders: they learn what is visible, on folds that share no subject, and their numbers are as defined."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import medmae
from medmae import HeadSettings
from medmae.cli import app
from medmae.cohort.labels import Label
from medmae.curves import kaplan_meier
from medmae.errors import CheckpointError, InputError
from medmae.outcomes import Classes, Labels, Survival, concordance, outcome_of, several
from medmae.training.schedules import warmed
from tests.test_probes import labelled, prepared  # noqa: F401

LINEAR = HeadSettings(mode="linear", epochs=60, batch_size=32, weight_decay=1.0)


def classify(folder: Path, out: Path, model: str = "vit", **more: Any) -> medmae.finetune.FinetunedHead:  # type: ignore[name-defined]
    options = {"data": folder / "scans", "column": "side", "settings": LINEAR, "folds": 3, "device": "cpu", **more}
    return medmae.finetune_classify(folder / "labels.csv", folder / model, out, **options)


def write_rows(file: Path, rows: list[list[object]]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


@pytest.fixture(scope="module")
def classified(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("classified")
    classify(labelled, out)
    return out


def test_a_visible_label_is_learnt_on_held_out_subjects(classified: Path) -> None:
    scores = json.loads((classified / "scores.json").read_text())
    assert scores["studies"] == 24 and scores["subjects"] == 12 and scores["folds"] == 3
    assert scores["scores"]["auc"]["value"] > 0.9
    assert scores["scores"]["auc"]["low"] <= scores["scores"]["auc"]["value"] <= scores["scores"]["auc"]["high"]
    frame = pd.read_csv(classified / "predictions.csv")
    assert roc_auc_score(frame.truth == "right", frame.p_right) == pytest.approx(scores["scores"]["auc"]["value"])
    frame["subject"] = frame.study.str[:3]
    assert (frame.groupby("subject").fold.nunique() == 1).all()
    assert (classified / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("model", ["vit", "cnn"])
def test_the_encoder_learns_along(labelled: Path, tmp_path: Path, model: str) -> None:  # noqa: F811
    settings = HeadSettings(epochs=6, lr=1e-3, head_lr=1e-2, modality_dropout=0.3)
    result = classify(labelled, tmp_path, model, settings=settings, folds=2)
    assert result.scores["auc"]["value"] > 0.8
    before = medmae.load(labelled / model).state_dict()
    after = medmae.load(tmp_path / "fold_0" / "encoder").state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    losses = json.loads((tmp_path / "fold_0" / "fold.json").read_text())["losses"]
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_numbers_and_finished_folds_stay(
    labelled: Path,  # noqa: F811
    classified: Path,
    tmp_path: Path,
) -> None:
    classify(labelled, tmp_path)
    assert (tmp_path / "predictions.csv").read_text() == (classified / "predictions.csv").read_text()
    stamp = (tmp_path / "fold_1" / "fold.json").stat().st_mtime_ns
    (tmp_path / "fold_0" / "fold.json").unlink()
    classify(labelled, tmp_path)
    assert (tmp_path / "fold_1" / "fold.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "predictions.csv").read_text() == (classified / "predictions.csv").read_text()
    other = classify(labelled, tmp_path / "other", settings=HeadSettings(**{**vars(LINEAR), "seed": 5}))
    assert (other.out / "predictions.csv").read_text() != (classified / "predictions.csv").read_text()


def test_a_fold_of_other_labels_or_weights_is_not_taken_for_this_one(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    rows: list[list[object]] = [["study", "side"]]
    rows += [[f"p{s:02}_ses-{v}", "left" if s % 2 else "right"] for s in range(12) for v in range(2)]
    table = write_rows(tmp_path / "t.csv", rows)

    def run(model: str, folds: int = 2) -> dict[str, Any]:
        settings = HeadSettings(**{**vars(LINEAR), "epochs": 2})
        medmae.finetune_classify(
            *(table, labelled / model, tmp_path / "out"),
            **{"data": labelled / "scans", "column": "side", "settings": settings, "folds": folds, "device": "cpu"},
        )
        found: dict[str, Any] = json.loads((tmp_path / "out" / "fold_0" / "fold.json").read_text())
        return found

    first = run("cnn")
    assert run("cnn") == first
    assert run("vit")["losses"] != first["losses"]
    for row in rows[1:]:  # all the other way round: the same folds, the same numbers of each class
        row[1] = "right" if row[1] == "left" else "left"
    write_rows(table, rows)
    assert run("cnn")["predicted"] != first["predicted"]
    run("cnn", folds=3)
    run("cnn", folds=2)  # a third fold of the run before still lies there
    made = medmae.predict_outcome(labelled / "scans", tmp_path / "out", tmp_path / "new.csv", device="cpu")
    assert (tmp_path / "out" / "fold_2").is_dir() and all(
        r["p_left"] + r["p_right"] == pytest.approx(1) for r in made.rows
    )
    (tmp_path / "out" / "fold_2" / "fold.json").write_text("{}")  # it is not read, then
    medmae.predict_outcome(labelled / "scans", tmp_path / "out", tmp_path / "new.csv", device="cpu")
    (tmp_path / "out" / "fold_1" / "fold.json").unlink()
    with pytest.raises(CheckpointError, match="a fold is missing"):
        medmae.predict_outcome(labelled / "scans", tmp_path / "out", tmp_path / "new.csv", device="cpu")


def test_new_studies_get_the_mean_of_the_folds(labelled: Path, classified: Path, tmp_path: Path) -> None:  # noqa: F811
    made = medmae.predict_outcome(labelled / "scans", classified, tmp_path / "new.csv", device="cpu")
    assert len(made.rows) == 24 and all(r["p_left"] + r["p_right"] == pytest.approx(1) for r in made.rows)
    truth = [int(row["study"][1:3]) % 2 == 1 for row in made.rows]
    assert roc_auc_score(truth, [row["p_left"] for row in made.rows]) > 0.95
    with pytest.raises(CheckpointError, match="no finished fold"):
        medmae.predict_outcome(labelled / "scans", tmp_path, tmp_path / "x.csv")


def test_folds_can_be_given(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    rows: list[list[object]] = [["study", "side", "fold"]]
    rows += [[f"p{s:02}_ses-{v}", "left" if s % 2 else "right", "ab"[s >= 6]] for s in range(12) for v in range(2)]
    table = write_rows(tmp_path / "t.csv", rows)
    result = medmae.finetune_classify(
        table, labelled / "cnn", tmp_path / "out", data=labelled / "scans", column="side", settings=LINEAR, device="cpu"
    )
    assert result.folds == 2
    rows[1][2] = "b"  # one session of p00 elsewhere
    with pytest.raises(InputError, match="two folds.*p00"):
        medmae.finetune_classify(
            write_rows(table, rows), labelled / "cnn", tmp_path / "out", data=labelled / "scans", column="side"
        )


def test_several_labels_a_study(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    rows: list[list[object]] = [["subject", "label"]]
    for s in range(12):
        names = [name for name, there in (("left", s % 2 == 1), ("large", s >= 6)) if there]
        rows.append([f"p{s:02}", ";".join(names) or "none"])
    table = write_rows(tmp_path / "t.csv", rows)
    scans = labelled / "scans"
    result = medmae.finetune_classify(table, labelled / "cnn", tmp_path, data=scans, settings=LINEAR, folds=2)
    assert isinstance(result.outcome, Labels) and result.outcome.names == ["large", "left"]
    assert result.scores["auc"]["value"] > 0.6


def test_risk_follows_what_decides_the_time(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    """Bright and large means early; every fourth is censored."""
    rows: list[list[object]] = [["subject", "time", "event"]]
    rows += [[f"p{s:02}", 3.0 + (5 if s % 2 else 40) - 0.2 * s, int(s % 4 != 3)] for s in range(12)]
    rows[1][1], rows[2][1], rows[3][2] = "-2", "soon", "maybe"
    table = write_rows(tmp_path / "t.csv", rows)
    arguments: list[object] = ["finetune", "survive", table, "--data", labelled / "scans", "-c", labelled / "vit"]
    arguments += ["-o", tmp_path / "o", "--linear", "--folds", 3, "--device", "cpu", "--json"]
    told = CliRunner().invoke(app, [str(a) for a in arguments])
    assert told.exit_code == 1, told.output  # three subjects could not be used
    scores = json.loads(told.stdout)
    assert scores["studies"] == 18 and scores["scores"]["c_index"]["value"] > 0.75
    assert told.stderr.count("no positive number") == 4 and told.stderr.count("neither 0 nor 1") == 2
    assert (tmp_path / "o" / "curves.png").exists()


def test_one_class_and_unknown_studies_are_told(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    rows: list[list[object]] = [["study", "label"], *([f"p{s:02}_ses-0", "x"] for s in range(12)), ["nobody", "y"]]
    with pytest.raises(InputError, match="one class only"):
        medmae.finetune_classify(
            write_rows(tmp_path / "t.csv", rows), labelled / "cnn", tmp_path, data=labelled / "scans", settings=LINEAR
        )
    rows[1][1] = "y"
    with pytest.raises(InputError, match="too few subjects") as refused:
        medmae.finetune_classify(
            write_rows(tmp_path / "t.csv", rows), labelled / "cnn", tmp_path, data=labelled / "scans", settings=LINEAR
        )
    assert any("row 13" in str(problem) for problem in refused.value.problems)


def test_features_are_one_row_a_study(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    from medmae.features import study_features

    for name in ("features.csv", "features.parquet"):
        medmae.predict_features(labelled / "scans", labelled / "cnn", tmp_path / name, device="cpu")
    first, second = pd.read_csv(tmp_path / "features.csv"), pd.read_parquet(tmp_path / "features.parquet")
    assert list(first.columns) == ["study", "subject", *(f"f{i}" for i in range(8))] and len(first) == 24
    np.testing.assert_allclose(first.iloc[:, 2:].to_numpy(), second.iloc[:, 2:].to_numpy(), rtol=1e-6)
    model = medmae.load(labelled / "cnn")
    study = prepared(labelled, tmp_path / "cohort", model).studies[3]
    row = first.set_index("study").loc[study.id].iloc[1:].to_numpy(float)
    np.testing.assert_allclose(row, study_features(model, study), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="csv or .parquet"):
        medmae.predict_features(labelled / "scans", labelled / "cnn", tmp_path / "features.xlsx")


def test_concordance_is_harrells() -> None:
    """Counted by hand: of the pairs (1,2), (1,3), (2,3) with the third censored, and a tie."""
    time, event = np.array([1.0, 2, 3]), np.array([1.0, 1, 0])
    assert concordance(np.array([3.0, 2, 1]), time, event) == 1
    assert concordance(np.array([1.0, 2, 3]), time, event) == 0
    assert concordance(np.array([2.0, 2, 1]), time, event) == pytest.approx(2.5 / 3)
    censored_first = np.array([0.0, 1, 0])  # of study 1 nothing is known after 1
    assert concordance(np.array([0.0, 2, 1]), time, censored_first) == 1
    assert np.isnan(concordance(np.array([1.0, 2, 3]), time, np.zeros(3)))


def test_hazard_loss_is_the_likelihood() -> None:
    """-log of h_3 Π_{j<3} (1 - h_j) for an event in bin 3, of Π_{j<3} (1 - h_j) for a study censored in it."""
    outcome = Survival([float(i) for i in range(1, 10)])
    logits = torch.randn(2, 10)
    hazard = logits.sigmoid()
    survived = (1 - hazard[:, :3]).log().sum(1)
    expected = -(survived[0] + hazard[0, 3].log()) - survived[1]
    truth = torch.tensor([[3.5, 1.0], [3.5, 0.0]])
    torch.testing.assert_close(outcome.loss(logits, truth), expected / 2)
    risk = outcome.predict(logits)[:, 0]
    np.testing.assert_allclose(risk, -(1 - hazard).cumprod(1).sum(1).numpy(), rtol=1e-5)


def test_bins_are_quantiles_of_the_events() -> None:
    targets = np.stack([np.arange(1.0, 102), np.ones(101)], axis=1)
    targets = np.concatenate([targets, [[500.0, 0.0]] * 50])
    assert Survival().fitted(targets).edges == pytest.approx([1 + 10 * i for i in range(1, 10)])


def test_kaplan_meier_steps_down_by_those_at_risk() -> None:
    time, share = kaplan_meier(np.array([[1.0, 1], [2, 0], [3, 1], [4, 1]]))
    assert time.tolist() == [0, 1, 3, 4] and share.tolist() == pytest.approx([1, 0.75, 0.375, 0])


def test_classes_weigh_the_inverse_of_their_frequency() -> None:
    fitted = Classes(["a", "b"]).fitted(np.array([0, 0, 0, 1]))
    assert fitted.weights == pytest.approx([4 / 6, 2.0])
    assert outcome_of(json.loads(json.dumps(fitted.to_json()))) == fitted
    assert several("a; b|c") == {"a", "b", "c"} and several("none") == set()
    assert Labels(["a", "b"]).target(Label("s", "s", "b", 1)).tolist() == [0, 1]


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [warmed(e, 20, 0.25) for e in range(20)]
    assert rates[:5] == pytest.approx([(e + 1) / 6 for e in range(5)])
    assert rates[5] == 1 and rates[-1] < 0.05 and all(a >= b for a, b in zip(rates[5:], rates[6:], strict=False))
