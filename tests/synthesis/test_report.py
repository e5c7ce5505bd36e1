"""What the pages say, and that they ask nobody for anything."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medmae
from medmae.imaging.geometry import resample
from medmae.imaging.nifti import write_nifti
from medmae.imaging.volume import Volume
from medmae.synthesis.layers import shown_grid
from medmae.synthesis.report_cohort import Row, page_name, write_cohort, write_index
from medmae.synthesis.report_page import asset
from tests.synthesis.fakes import Linear, plan
from tests.synthesis.report_case import HASHES, Page, model, study, synthesise, write

BUDGET = 550_000  # bytes of a page beside its volumes: the viewer, still pictures, licences


def test_page_shows_inputs_synthesis_truth_and_difference(tmp_path: Path) -> None:
    written = write(tmp_path / "case.html")
    page = Page(tmp_path / "case.html")
    assert [e["title"] for e in page.data["images"]] == [
        *["T1", "T2", "FLAIR synthetic", "FLAIR truth", "FLAIR difference"],
    ]
    assert [e["title"] for e in page.data["images"] if e["synthetic"]] == ["FLAIR synthetic"]
    panels = page.data["panels"]
    assert [panel["base"] for panel in panels] == [0, 1, 2, 3]
    assert panels[2]["truth"] == 3 and panels[2]["overlays"] == {"difference": 4}
    assert panels[2]["group"] == panels[3]["group"] != panels[0]["group"]
    assert written.bytes - written.image_bytes * 4 / 3 < BUDGET
    assert written.bytes == (tmp_path / "case.html").stat().st_size
    assert "SYNTHETIC \u2013 NOT ACQUIRED" in page.text
    score = written.scores["flair"]
    assert f"{score.psnr:.2f} dB" in page.text and f"{score.mae:.3f} sd" in page.text
    assert HASHES["t1"] in page.text and HASHES["t2"] in page.text and "c0ffee" in page.text


def test_values_are_those_of_the_volumes_and_of_the_synthesis(tmp_path: Path) -> None:
    volumes = study()
    write(tmp_path / "case.html", volumes)
    page, grid = Page(tmp_path / "case.html"), shown_grid(volumes["t1"])
    images = {t: page.image(t) for t in ("T1", "FLAIR synthetic", "FLAIR truth", "FLAIR difference")}
    for _, nifti in images.values():
        assert np.allclose(nifti.affine, grid.affine, atol=1e-3) and nifti.shape == grid.shape
    inside = resample(volumes["t1"].with_array(volumes["t1"].array != 0), grid).array
    deep = np.zeros_like(inside)
    deep[8:-8, 8:-8, 8:-8] = inside[8:-8, 8:-8, 8:-8]
    assert deep.sum() > 1000

    def step(title: str) -> float:
        return (images[title][0]["high"] - images[title][0]["low"]) / 254

    def values(title: str) -> np.ndarray:
        return np.asarray(images[title][1].get_fdata())[deep]

    t1 = resample(volumes["t1"], grid).array[deep]
    assert np.abs(np.median(values("T1") - t1)) < step("T1")
    truth = resample(volumes["flair"], grid).array
    zscored = ((truth - truth[truth != 0].mean()) / truth[truth != 0].std())[deep]
    assert np.abs(values("FLAIR truth") - zscored).max() < 2 * step("FLAIR truth")
    residual = np.clip(values("FLAIR synthetic") - values("FLAIR truth"), -1.5, 1.5)
    assert np.abs(values("FLAIR difference") - residual).max() < 3 * step("FLAIR difference") + step("FLAIR truth")


def test_without_a_truth_there_is_none_on_the_page(tmp_path: Path) -> None:
    volumes = study()
    del volumes["flair"]
    written = write(tmp_path / "case.html", volumes)
    page = Page(tmp_path / "case.html")
    assert [e["title"] for e in page.data["images"]] == ["T1", "T2", "FLAIR synthetic"]
    assert written.scores == {} and "Against the truth" not in page.text
    entry, nifti = page.image("FLAIR synthetic")
    assert entry["unit"] == "units of the file"
    inside = nifti.get_fdata()[nifti.get_fdata() > entry["low"] - 1e-6]
    assert 100 < np.median(inside) < 300  # around the 200 of the training cohort


def test_truth_uncertainty_anomaly_and_warnings_are_handed_on(tmp_path: Path) -> None:
    volumes = study()
    flair = volumes.pop("flair")
    made = synthesise(volumes)["flair"].volume
    # 25 units of the file are half a standard deviation of the training cohort; on a grid of its own.
    spread = Volume(np.full((10, 10, 10), 25.0), made.affine @ np.diag([4.0, 5, 4.5, 1]))
    lesion = np.zeros(flair.shape)
    lesion[10:14, 20:24, 18:22] = 3.0
    written = write(
        tmp_path / "case.html",
        volumes,
        truth={"flair": flair},
        uncertainty={"flair": spread},
        anomaly={"t2": flair.with_array(lesion)},
        warnings=["unlike the training cohort: <distance> 9.1"],
    )
    page = Page(tmp_path / "case.html")
    assert set(written.scores) == {"flair"} and written.warnings == ("unlike the training cohort: <distance> 9.1",)
    assert "unlike the training cohort: <distance> 9.1" in page.text and "<distance>" not in page.raw
    assert ("section", {"class": "warnings", "role": "alert", "aria-label": "Warnings"}) in page.elements
    overlays = {page.data["images"][p["base"]]["title"]: set(p["overlays"]) for p in page.data["panels"]}
    assert overlays == {
        "T1": set(),
        "T2": {"anomaly"},
        "FLAIR synthetic": {"difference", "uncertainty"},
        "FLAIR truth": {"difference", "uncertainty"},
    }
    entry, nifti = page.image("FLAIR uncertainty")
    assert entry["unit"] == "sd"
    assert np.median(nifti.get_fdata()[nifti.get_fdata() > 0]) == pytest.approx(0.5, abs=0.01)
    _, hot = page.image("T2 anomaly")
    place = np.argwhere(hot.get_fdata() > 1.5).mean(axis=0)
    expected = flair.grid.voxel_to_mm([11.5, 21.5, 19.5])
    assert np.allclose(nib.affines.apply_affine(hot.affine, place), expected, atol=0.6)


@pytest.mark.parametrize("name", ["</script><b>{{data}}", 'a"onload=x', "caf\u00e9 {{niivue}}"])
def test_a_strange_study_name_stays_text(tmp_path: Path, name: str) -> None:
    write(tmp_path / "case.html", name=name)
    page = Page(tmp_path / "case.html")
    assert name in page.text and len(page.data["images"]) == 5
    assert not [1 for tag, attrs in page.elements if tag == "b" or any(key.startswith("on") for key in attrs)]


def check_offline(page: Page) -> None:
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0]
    rules = dict(rule.split(maxsplit=1) for rule in policies[0].split("; "))
    assert rules["default-src"] == "'none'"  # fetch, workers, frames, fonts, media
    allowed = {word for rule, words in rules.items() for word in words.split()}
    assert allowed <= {"'none'", "data:", "'unsafe-inline'"}
    for _, attrs in page.elements:
        assert (attrs.get("src") or "data:").startswith("data:")
        assert re.fullmatch(r"[^:/]+\.html", attrs.get("href") or "x.html")  # of the same folder
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "embed", "base")]


def test_pages_ask_nobody_for_anything_and_every_picture_has_words(tmp_path: Path) -> None:
    write(tmp_path / "a.html", name="a")
    write(tmp_path / "b.html", name="b")
    index = write_index(tmp_path)
    assert index == tmp_path / "index.html"
    for path in (tmp_path / "a.html", index):
        page = Page(path)
        check_offline(page)
        images = [attrs for tag, attrs in page.elements if tag == "img"]
        assert len(images) >= 4 and all((image.get("alt") or "").strip() for image in images)
        marked = [image for image in images if "synthetic" in str(image["alt"]).lower()]
        assert marked and len(marked) < len(images)


def test_the_same_study_gives_the_same_page(tmp_path: Path) -> None:
    write(tmp_path / "a.html")
    write(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_cohort_page_has_a_row_a_study_with_scores_warnings_and_links(tmp_path: Path) -> None:
    scores = {
        name: write(tmp_path / f"{name}.html", study(right=right), name=name, warnings=warnings).scores["flair"]
        for name, right, warnings in (("b 1", 50.0, ()), ("a#2", 300.0, ("unlike the training cohort",)))
    }
    (tmp_path / "other.html").write_text("<html>somebody else's</html>")
    page = Page(write_index(tmp_path))  # type: ignore[arg-type]
    assert [a["href"] for t, a in page.elements if t == "a"] == ["a%232.html", "b%201.html"]
    assert "unlike the training cohort" in page.text and "With warnings: 1 of the studies" in page.text
    values = [float(a["data-value"] or "nan") for t, a in page.elements if "data-value" in a]
    assert values == pytest.approx([v for n in ("a#2", "b 1") for v in vars(scores[n]).values()][:3] + values[3:])
    assert values[3] == pytest.approx(scores["b 1"].psnr) and len(values) == 6
    assert sum(t == "img" for t, _ in page.elements) == 4  # synthesis and truth of both
    assert "somebody" not in page.raw


def test_one_page_needs_no_cohort_page(tmp_path: Path) -> None:
    write(tmp_path / "case.html")
    assert write_index(tmp_path) is None and not (tmp_path / "index.html").exists()


def test_what_is_not_known_is_left_empty_and_not_a_number(tmp_path: Path) -> None:
    rows = [Row("a", "flair", "t1+t2", {"psnr": 20.0, "ssim": float("nan")}), Row("b", "flair", "t1", {"psnr": None})]
    page = Page(write_cohort(tmp_path / "x.html", "title", rows, {}))
    assert "nan" not in page.raw.lower().split("<tbody>")[1].split("</tbody>")[0]
    assert "SSIM" not in page.text and "PSNR, dB" in page.text


def test_no_study_takes_the_name_of_the_cohorts_page() -> None:
    assert page_name("case") == "case.html"
    assert page_name("Index").lower() != "index.html"


def test_the_vendored_viewer_is_the_one_that_its_notice_names() -> None:
    notice = asset("niivue.NOTICE.txt")
    found = re.search(r"^sha256 ([0-9a-f]{64})$", notice, re.MULTILINE)
    assert found and hashlib.sha256(asset("niivue.min.js").encode()).hexdigest() == found[1]
    locked = json.loads((Path(__file__).parents[2] / "web" / "package-lock.json").read_text())["packages"]
    named = re.findall(r"^  (\S+) (\S+) \((?:BSD-2-Clause|MIT|ISC)\)$", notice, re.MULTILINE)
    assert "@niivue/niivue" in dict(named)
    for name, version in named:
        assert locked[f"node_modules/{name}"]["version"] == version
        assert f"{name} {version}\n{'=' * 80}" in notice  # its licence


def scans(folder: Path, names: tuple[str, ...] = ("p1", "p2")) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for modality, volume in study(right=80.0 * number).items():
            write_nifti(volume, folder / name / f"{modality}.nii.gz")
    return folder


def test_reconstruct_lists_its_own_and_earlier_pages(tmp_path: Path) -> None:
    data, out = scans(tmp_path / "scans"), tmp_path / "out"
    first = medmae.reconstruct(data / "p1", model(), out, targets=["flair"], report=True, device="cpu")
    assert [path.name for path in first.reports] == ["p1.html"]
    second = medmae.reconstruct(data / "p2", model(), out, targets=["flair"], report=True, device="cpu")
    assert [path.name for path in second.reports] == ["p2.html", "index.html"]
    page = Page(out / "index.html")
    assert [a["href"] for t, a in page.elements if t == "a"] == ["p1.html", "p2.html"]
    plain = medmae.reconstruct(data / "p2", model(), tmp_path / "plain", targets=["flair"], device="cpu")
    assert plain.reports == [] and not list((tmp_path / "plain").glob("*.html"))


def test_evaluation_has_a_page_of_all_rows_and_pages_of_studies_if_asked(tmp_path: Path) -> None:
    data, out = scans(tmp_path / "scans"), tmp_path / "scores"
    scores = medmae.evaluate_synthesis(data, model(), out, report=True, device="cpu")
    page = Page(out / "index.html")
    check_offline(page)
    rows = [attrs for tag, attrs in page.elements if tag == "tr" and "data-target" in attrs]
    own = [row for row in scores.rows if row["predictor"] == "model"]
    assert [(r["data-target"], r["data-inputs"]) for r in rows] == [(r["target"], r["inputs"]) for r in own]
    told = [float(a["data-value"] or "nan") for t, a in page.elements if "data-value" in a]
    assert told[:: len(told) // len(rows)] == pytest.approx([row["psnr"] for row in own])
    pictured = sum(tag == "img" for tag, _ in page.elements)
    assert pictured == 2 * 3 * 2  # studies, targets from all others, synthesis and truth
    sheet = Page(out / "p1.html")
    check_offline(sheet)
    titles = [entry["title"] for entry in sheet.data["images"] if entry["synthetic"]]
    assert titles == ["T1 synthetic", "T2 synthetic", "FLAIR synthetic"]
    full = {row["target"]: row for row in own if row["study"] == "p1" and "+" in row["inputs"]}
    assert all(f"{row['psnr']:.2f} dB" in sheet.text for row in full.values()) and len(full) == 3
    assert scores.files["page"] == out / "index.html"
    medmae.evaluate_synthesis(data, model(), tmp_path / "plain", targets=["flair"], device="cpu")
    assert [path.name for path in (tmp_path / "plain").glob("*.html")] == ["index.html"]


def test_where_zero_is_a_value_it_is_no_background(tmp_path: Path) -> None:
    """Water of a CT is 0 and has its grey."""
    grid = np.diag([2.0, 2, 2, 1])
    values = np.tile(np.linspace(-100, 100, 41)[:, None, None], (1, 40, 40)).astype(np.float32)
    windowed = Linear(
        plan(("ct", "pet"), spacing=[2.0] * 3, intensity={"scheme": "window", "low": -100, "high": 100}), {"ct": 1.0}
    )
    medmae.write_nifti(Volume(values, grid), tmp_path / "ct.nii.gz")
    medmae.reconstruct([], windowed, tmp_path, images={"ct": tmp_path / "ct.nii.gz"}, report=True, device="cpu")
    (page,) = tmp_path.glob("*.html")
    for title in ("CT", "PET synthetic"):
        _, image = Page(page).image(title)
        codes = np.asarray(image.dataobj.get_unscaled())
        assert codes.min() > 0 and abs(int(codes[20, 20, 20]) - 128) <= 2
