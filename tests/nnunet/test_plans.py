"""Plans that suit a checkpoint: the network sees what it saw in pre-training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import medmae
from medmae import Cohort, Plan, make_dataset, prepare
from medmae.errors import InputError
from medmae.nnunet.plans import build_plans, read_dataset
from medmae.plan import Finetuning
from tests.nnunet.conftest import model_of
from tests.nnunet.test_transfer import NOTHING_KNOWN
from tests.training.conftest import write_scans


def plans_for(raw: Path, model: Any, **more: Any) -> dict[str, Any]:
    return build_plans(read_dataset(raw), model, None, NOTHING_KNOWN, name="p", settings=Finetuning(), **more)


def preprocessed(raw: Path, plans: dict[str, Any], case: str, channels: int = 2) -> tuple[np.ndarray, dict[str, Any]]:
    """What nnU-Net gives the network."""
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    files = [str(raw / "imagesTr" / f"{case}_{i:04}.nii.gz") for i in range(channels)]
    preprocessor = configuration.preprocessor_class(verbose=False)
    description = json.loads((raw / "dataset.json").read_text())
    data, _, properties = preprocessor.run_case(files, None, manager, configuration, description)
    return np.asarray(data), properties


@pytest.mark.parametrize("scheme", ["zscore-nonzero", "zscore", "none"])
def test_nnunet_prepares_images_as_pretraining_did(raw: Path, tmp_path: Path, scheme: str) -> None:
    """Orientation, axis order, crop and intensities, voxel by voxel, of an image stored with turned axes."""
    model = model_of("bm-mae", modalities=["t1", "flair"], image={"crop": [16] * 3, "intensity": {"scheme": scheme}})
    data, _ = preprocessed(raw, plans_for(raw, model), "case_0")
    prepare(raw, model.plan, tmp_path / "cohort", jobs=1)
    study = next(s for s in Cohort.open(tmp_path / "cohort").studies if s.id == "case_0")
    assert data.shape[1:] == study.shape == (24, 16, 20)  # x, y, z of the head
    for number, modality in enumerate(("t1", "flair")):
        np.testing.assert_allclose(data[number], study.array(modality).astype(np.float32), rtol=2e-3, atol=5e-3)


def test_a_window_of_ct_becomes_zero_to_one(raw: Path) -> None:
    image = {"crop": [16] * 3, "foreground_crop": False, "intensity": {"scheme": "window", "low": 150, "high": 300}}
    data, _ = preprocessed(raw, plans_for(raw, model_of("hi-end-mae", image=image)), "case_0")
    stored = nib.as_closest_canonical(nib.load(raw / "imagesTr" / "case_0_0000.nii.gz")).get_fdata()
    box = np.nonzero(stored)
    stored = stored[tuple(slice(b.min(), b.max() + 1) for b in box)]
    np.testing.assert_allclose(data[0], np.clip((stored - 150) / 150, 0, 1), atol=1e-5)


def test_spacing_is_the_checkpoints_unless_detail_would_be_lost(raw: Path) -> None:
    def spacing(mm: float, **more: Any) -> list[float]:
        model = model_of("bm-mae", image={"crop": [16] * 3, "spacing": [mm] * 3})
        found: list[float] = plans_for(raw, model, **more)["configurations"]["3d_fullres"]["spacing"]
        return found

    assert spacing(1.4) == [1.4] * 3 and spacing(0.7) == [0.7] * 3
    assert spacing(3.0) == [1.0] * 3  # the data's
    assert spacing(3.0, spacing="checkpoint") == [3.0] * 3 and spacing(1.4, spacing="dataset") == [1.0] * 3


def test_patches_fit_the_network_and_the_data(raw: Path) -> None:
    def patch(method: str, **more: Any) -> list[int]:
        found: list[int] = plans_for(raw, model_of(method), **more)["configurations"]["3d_fullres"]["patch_size"]
        return found

    assert patch("bm-mae") == [28, 20, 24]  # 26, 18 and 22 voxels, in patches of 4
    assert patch("spark") == [28, 20, 24]
    assert patch("spark", patch=(8, 16, 8)) == [8, 16, 8]
    with pytest.raises(InputError, match="multiples"):
        patch("spark", patch=(10, 16, 8))


def test_the_schedule_is_the_plans_and_can_be_changed() -> None:
    from medmae.nnunet.segment import finetuning_of

    assert finetuning_of(Plan.load("bm-mae-base"), []).lr == 5e-4
    changed = finetuning_of(Plan.load("hi-end-mae-base"), ["lr=0.01", "finetuning.epochs=3"])
    assert (changed.lr, changed.epochs, changed.optimizer) == (0.01, 3, "adamw")
    with pytest.raises(medmae.PlanError, match="warmup"):
        finetuning_of(Plan.load("bm-mae-base"), ["warmups=1"])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda raw: (raw / "dataset.json").unlink(), "no nnU-Net data set"),
        (lambda raw: (raw / "dataset.json").write_text('{"channel_names": {"0": "T1"}}'), "cannot use"),
        (lambda raw: [f.unlink() for f in (raw / "imagesTr").iterdir()], "no training images"),
        (lambda raw: raw.rename(raw.parent / "Boxes"), "no nnU-Net data set|another name"),
    ],
)
def test_what_nnunet_cannot_use_is_told(tmp_path: Path, break_it: Any, message: str) -> None:
    from tests.nnunet.conftest import write_raw

    raw = write_raw(tmp_path, cases=1)
    break_it(raw)
    with pytest.raises(InputError, match=message):
        read_dataset(raw)


def test_channels_can_be_named(raw: Path) -> None:
    assert read_dataset(raw).channels == ("t1", "flair")
    assert read_dataset(raw, ["T2", "dwi"]).channels == ("t2", "dwi")
    with pytest.raises(InputError, match="2 different names"):
        read_dataset(raw, ["t1"])


def test_a_data_set_is_made_of_any_layout(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", 4)
    for number, case in enumerate(sorted(scans.iterdir())):
        image = nib.load(case / "t2.nii.gz")
        label = np.zeros(image.shape, np.uint8)
        label[5:9, 5:9, 5:9] = 4 if number == 2 else 7
        if number < 3:
            nib.save(nib.Nifti1Image(label, image.affine), case / "seg.nii.gz")
    made = make_dataset(scans, tmp_path / "Dataset007_Made", modalities=["t1", "t1c"])
    assert made.studies == ["case0", "case2"] and made.labels == {"background": 0, "seg_4": 1, "seg_7": 2}
    assert sorted(p.where for p in made.problems if p.where) == ["case1", "case3"]  # lacks t1c, lacks seg
    assert read_dataset(made.folder).channels == ("t1", "t1c")
    again = nib.load(made.folder / "imagesTr" / "case0_0001.nii.gz")
    np.testing.assert_array_equal(again.get_fdata(), nib.load(scans / "case0" / "t1c.nii.gz").get_fdata())
    assert set(np.unique(nib.load(made.folder / "labelsTr" / "case0.nii.gz").get_fdata())) == {0, 2}

    whole = make_dataset(scans, tmp_path / "Dataset008_Made", modalities=["t1", "t1c"], incomplete=True)
    assert whole.studies == ["case0", "case1", "case2"]
    assert not nib.load(whole.folder / "imagesTr" / "case1_0001.nii.gz").get_fdata().any()
    with pytest.raises(InputError, match="another name"):
        make_dataset(scans, tmp_path / "Made")
    with pytest.raises(InputError, match="there are seg"):
        make_dataset(scans, tmp_path / "Dataset009_Made", label="tumour")
    for case in list(scans.iterdir()):  # now every study has another modality than the others
        shutil.rmtree(case)
    for modality in ("t1", "t2", "flair"):
        case = scans / f"with-{modality}"
        case.mkdir()
        for name in (modality, "seg"):
            nib.save(nib.Nifti1Image(label, image.affine), case / f"{name}.nii.gz")
    with pytest.raises(InputError, match="--modality.*half.*flair in 1 of 3"):
        make_dataset(scans, tmp_path / "Dataset010_Made", incomplete=True)
    each = make_dataset(scans, tmp_path / "Dataset010_Made", incomplete=True, modalities=["t1", "t2", "flair"])
    assert len(each.studies) == 3
