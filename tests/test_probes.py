"""Probes of frozen features: the right studies, honest splits, and numbers that scikit-learn gives too."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import medmae
from medmae import Cohort, Plan, prepare
from medmae.cohort.labels import read_labels
from medmae.cohort.study import Study
from medmae.errors import InputError, Problem
from medmae.features import study_features
from medmae.imaging.nifti import write_nifti
from medmae.imaging.volume import Volume
from medmae.probes import begin, cross_predict, evaluate_features, grouped
from tests.training.conftest import PLAN

SIZE = (24, 20, 16)


def write_labelled(folder: Path, subjects: int = 12, sessions: int = 2) -> Path:
    """Subjects with a bright ball in one half of the head, and a table that says so. One session lacks t1."""
    rows = [["study", "subject", "side", "size"]]
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE), indexing="ij"))
    head = (grid**2).sum(0) < 0.95
    for s in range(subjects):
        for v in range(sessions):
            rng = np.random.default_rng([s, v])
            ball = ((grid - np.array([0.0, 0.0, 0.3]).reshape(3, 1, 1, 1)) ** 2).sum(0) < (0.1 + 0.02 * s)
            bright = ball * (400 if s % 2 else -150)
            here = folder / "scans" / f"p{s:02}" / f"ses-{v}"
            here.mkdir(parents=True)
            for name in ("t1", "t2") if (s, v) != (0, 1) else ("t2",):
                array = (300 + bright + 40 * rng.standard_normal(SIZE)) * head
                write_nifti(Volume(array.astype(np.float32), np.eye(4)), here / f"{name}.nii.gz")
            rows.append([f"p{s:02}_ses-{v}", f"p{s:02}", "left" if s % 2 else "right", str(1.5 * s)])
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_labelled(tmp_path_factory.mktemp("probes"))
    for name, method, model in (
        ("vit", "bm-mae", PLAN["model"]),
        ("cnn", "resenc-mae", {"features": [4, 8], "blocks": [1, 1], "mask_unit": [4, 4, 4]}),
    ):
        torch.manual_seed(0)
        plan = {**PLAN, "name": name, "method": method, "model": model, "masking": {"sampler": "shared"}}
        medmae.create(plan).save_pretrained(folder / name)
    return folder


def test_two_checkpoints_on_a_label_that_is_visible(labelled: Path, tmp_path: Path) -> None:
    scores = evaluate_features(
        labelled / "scans", labelled / "labels.csv", [labelled / "vit", labelled / "cnn"], tmp_path, column="side"
    )
    assert (scores.studies, scores.subjects, scores.folds, scores.classes) == (24, 12, 5, ["left", "right"])
    by = {(row["features"], row["probe"]): row for row in scores.rows}
    assert by["vit", "linear"]["auc"] > 0.9 and by["cnn", "linear"]["auc"] > 0.9
    assert by["image statistics", "linear"]["auc"] > 0.9
    constant = by["always the same", "none"]
    assert constant["auc"] == constant["balanced_accuracy"] == 0.5
    assert all(row["auc_low"] <= row["auc"] <= row["auc_high"] for row in scores.rows)
    assert {"vit, random weights", "cnn, random weights"} <= {features for features, _ in by}
    assert all(path.stat().st_size > 0 for path in scores.files.values())
    assert json.loads(scores.files["json"].read_text())["task"] == "classify"
    with scores.files["predictions"].open() as stream:
        rows = [r for r in csv.DictReader(stream) if r["features"] == "vit" and r["probe"] == "linear"]
    truth, told = [r["truth"] == "right" for r in rows], [float(r["p_right"]) for r in rows]
    assert roc_auc_score(truth, told) == pytest.approx(by["vit", "linear"]["auc"])

    again = evaluate_features(
        labelled / "scans", labelled / "labels.csv", labelled / "vit", tmp_path / "2", column="side", floors=False
    )
    assert again.rows[0] == by["vit", "linear"]


def test_a_quantity_is_regressed(labelled: Path, tmp_path: Path) -> None:
    scores = evaluate_features(
        labelled / "scans", labelled / "labels.csv", labelled / "cnn", tmp_path, column="size", folds=4
    )
    assert scores.task == "regress" and scores.folds == 4
    by = {(row["features"], row["probe"]): row for row in scores.rows}
    assert by["always the same", "none"]["spearman"] == 0.0 and by["always the same", "none"]["r2"] <= 0
    assert by["cnn", "linear"]["mae"] < by["always the same", "none"]["mae"]


def prepared(labelled: Path, out: Path, model: medmae.models.base.MaskedAutoencoder) -> Cohort:  # type: ignore[name-defined]
    prepare(labelled / "scans", model.plan, out, jobs=1)
    return Cohort.open(out)


def test_features_are_the_foreground_mean_of_the_tokens(labelled: Path, tmp_path: Path) -> None:
    """One window that holds the whole study: recomputed token by token."""
    plan = Plan.load({**PLAN, "image": {"crop": [24, 20, 16]}})
    torch.manual_seed(1)
    model = medmae.create(plan).eval()
    study = next(s for s in prepared(labelled, tmp_path / "cohort", model).studies if len(s.modalities) == 2)
    low = [(c - n) // 2 for c, n in zip((24, 20, 16), study.shape, strict=True)]
    box = tuple(slice(a, a + n) for a, n in zip(low, study.shape, strict=True))
    images, inside = {}, np.zeros((24, 20, 16))
    for m in ("t1", "t2"):
        whole = np.zeros((24, 20, 16), np.float32)
        whole[box] = study.array(m)
        images[m] = torch.from_numpy(whole)[None, None]
        inside = np.maximum(inside, whole != 0)
    from scipy.ndimage import binary_fill_holes

    inside = binary_fill_holes(inside).astype(float)
    share = inside.reshape(6, 4, 5, 4, 4, 4).mean((1, 3, 5)).ravel()
    with torch.no_grad():
        tokens = model.encode(images)[0].numpy()
    expected = (tokens[1:] * np.tile(share, 2)[:, None]).sum(0) / (2 * share.sum())
    np.testing.assert_allclose(study_features(model, study), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(study_features(model, study, pool="cls"), tokens[0], rtol=1e-4, atol=1e-5)


def test_incomplete_studies_have_features_and_cnns_no_cls(labelled: Path, tmp_path: Path) -> None:
    model = medmae.load(labelled / "cnn")
    cohort = prepared(labelled, tmp_path / "cohort", model)
    alone = next(s for s in cohort.studies if s.modalities == ("t2",))
    assert study_features(model, alone).shape == (8,)
    with pytest.raises(InputError, match="CLS"):
        study_features(model, alone, pool="cls")


def test_held_out_predictions_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x, truth = rng.standard_normal((40, 6)).astype(np.float32), np.arange(40) % 2
    x[:, 0] += 1.5 * truth
    labels = [medmae.cohort.labels.Label(f"s{i}", f"p{i}", "ab"[t], i) for i, t in enumerate(truth)]  # type: ignore[attr-defined]
    scores = begin(Path("unused"), "label", "auto", labels, [])
    groups = [label.subject for label in labels]
    splits = grouped(truth, groups, scores, 4, 0)
    assert splits is not None
    got = cross_predict(x, truth, groups, splits, "linear", scores, 0)
    strengths = [10.0**e for e in range(-5, 2)]
    for train, test in splits:
        options = []
        for c in strengths:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, class_weight="balanced"))
            options.append(model.fit(x[train], truth[train]).predict_proba(x[test]))
        assert any(np.allclose(got[test], option) for option in options)


def test_no_subject_is_on_both_sides() -> None:
    labels = [medmae.cohort.labels.Label(f"s{i}", f"p{i // 3}", "ab"[i // 3 % 2], i) for i in range(30)]  # type: ignore[attr-defined]
    scores = begin(Path("unused"), "label", "auto", labels, [])
    truth, groups = np.array([i // 3 % 2 for i in range(30)]), np.array([label.subject for label in labels])
    splits = grouped(truth, groups, scores, 5, 0)
    assert splits is not None and len(splits) == 5
    for train, test in splits:
        assert not set(groups[train]) & set(groups[test])
    assert sorted(np.concatenate([test for _, test in splits]).tolist()) == list(range(30))


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    studies = [Study(f"p{i}_a", f"p{i}", {}, "a") for i in range(4)]
    table = tmp_path / "labels.csv"
    table.write_text("subject,grade\np0,1\np1,\np9,2\np2,3\np2,4\n,1\n")
    problems: list[Problem] = []
    labels = read_labels(table, "grade", studies, problems)
    assert [(label.study, label.value, label.row) for label in labels] == [("p0_a", "1", 1), ("p2_a", "3", 4)]
    told = [(p.where, p.what) for p in problems]
    assert [where.rsplit(", ", 1)[1] for where, _ in told if where] == ["row 2", "row 3", "row 5", "row 6"]
    assert "missing" in told[0][1] and "no study" in told[1][1] and "two labels" in told[2][1]
    with pytest.raises(InputError, match="grade"):
        read_labels(table, "grad", studies, problems)
    with pytest.raises(InputError, match="names the studies"):
        (tmp_path / "other.csv").write_text("age,grade\n3,1\n")
        read_labels(tmp_path / "other.csv", "grade", studies, problems)


def test_what_cannot_be_probed_is_told(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("study,label\n" + "".join(f"p{i:02}_ses-0,x\n" for i in range(12)))
    with pytest.raises(InputError, match="too few"):
        evaluate_features(labelled / "scans", tmp_path / "one.csv", labelled / "cnn", tmp_path, floors=False)
    (tmp_path / "rare.csv").write_text("study,label\n" + "".join(f"p{i:02}_ses-0,{int(i == 3)}\n" for i in range(12)))
    with pytest.raises(InputError, match="too few subjects") as refused:
        evaluate_features(labelled / "scans", tmp_path / "rare.csv", labelled / "cnn", tmp_path, floors=False)
    assert "1: 1" in str(refused.value)
    assert not (tmp_path / "probes.csv").exists()
