"""A real archive: Orthanc on loopback, spoken to by DCMTK and by medmae, gives back what it was given."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pydicom
import pytest

from medmae.imaging.dicom_out.archive import Archive
from medmae.imaging.dicom_out.segmentation import write_segmentation
from medmae.imaging.dicom_out.writing import write_synthetic_mr
from medmae.imaging.volume import Volume
from tests.imaging.dicom_out.made_series import affine, head, program, write_series

pytestmark = pytest.mark.slow


class Running(NamedTuple):
    port: str
    move_port: int
    archive: Archive


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Orthanc in a folder of its own, at free ports of loopback, without its web server."""
    pytest.importorskip("pynetdicom", reason="pynetdicom is not installed")
    folder = tmp_path_factory.mktemp("orthanc")
    port, moved = free_port(), free_port()
    settings = {
        "Name": "TEST",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "DicomServerEnabled": True,
        "DicomPort": port,
        "DicomAet": "TEST",
        "HttpServerEnabled": False,
        "Plugins": [],
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowMove": True,
        "DicomModalities": {"medmae": ["MEDMAE", "127.0.0.1", moved]},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([program("Orthanc"), str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        archive = Archive("127.0.0.1", port, "TEST", timeout=30)
        for _ in range(120):
            try:
                archive.echo()
                break
            except Exception:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        else:
            pytest.fail((folder / "log").read_text())
        yield Running(str(port), moved, archive)
    finally:
        process.terminate()
        process.wait(30)


class Study(NamedTuple):
    source: list[Path]
    synthetic: list[Path]
    segmentation: Path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study, and what was made from it. The segmentation has a time, so it is made once."""
    folder = tmp_path_factory.mktemp("study")
    matrix = affine((17, -23, 9))
    template = write_series(folder / "in", matrix, numbering="shuffled")
    options = {"version": "0.1.0", "checkpoint_hash": "c0ffee"}
    made = write_synthetic_mr(
        Volume(head(), matrix), template, folder / "out", target="flair", sources=[template], **options
    )
    labels = Volume((head() > 500).astype("uint8"), matrix)
    return Study(
        template, made, write_segmentation(labels, template, folder / "seg.dcm", names={1: "lesion"}, **options)
    )


def run(*command: str) -> str:
    shown = subprocess.run([program(command[0]), *command[1:]], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout + shown.stderr


def assert_unchanged(sent: list[Path], back: list[Path]) -> None:
    """The same instances, each with the same elements, pixels and UIDs."""
    there = {str(pydicom.dcmread(path).SOPInstanceUID): path for path in back}
    assert len(back) == len(sent) == len(there)
    for path in sent:
        one = pydicom.dcmread(path)
        other = pydicom.dcmread(there[str(one.SOPInstanceUID)])
        assert one == other
        assert one.PixelData == other.PixelData


def test_dcmtk_stores_finds_and_retrieves_the_synthesis_unchanged(
    orthanc: Running, study: Study, tmp_path: Path
) -> None:
    server = ["-aec", "TEST", "127.0.0.1", orthanc.port]
    run("storescu", *server, *map(str, study.source))
    run("storescu", *server, *map(str, study.synthetic))
    made, source = pydicom.dcmread(study.synthetic[0]), pydicom.dcmread(study.source[0])
    keys = [f"StudyInstanceUID={source.StudyInstanceUID}", "SeriesDescription", "SeriesInstanceUID", "Modality"]
    answer = run("findscu", "-S", "-k", "QueryRetrieveLevel=SERIES", *(w for k in keys for w in ("-k", k)), *server)
    assert made.SeriesInstanceUID in answer and source.SeriesInstanceUID in answer  # both in the one study
    assert "SYNTHETIC FLAIR" in answer
    by_patient = run(
        "findscu", "-S", "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID=P1", "-k", "StudyInstanceUID", *server
    )
    assert by_patient.count("(0020,000d) UI [") == 1 and source.StudyInstanceUID in by_patient

    got = tmp_path / "got"
    got.mkdir()
    wanted = [f"StudyInstanceUID={made.StudyInstanceUID}", f"SeriesInstanceUID={made.SeriesInstanceUID}"]
    keys = ["-k", "QueryRetrieveLevel=SERIES", *(w for k in wanted for w in ("-k", k))]
    run("getscu", "-S", "+xe", *keys, "-od", str(got), *server)
    assert_unchanged(study.synthetic, list(got.iterdir()))


def test_dcmtk_has_the_synthesis_moved(orthanc: Running, study: Study, tmp_path: Path) -> None:
    server = ["-aec", "TEST", "127.0.0.1", orthanc.port]
    run("storescu", *server, *map(str, study.synthetic))
    made = pydicom.dcmread(study.synthetic[0])
    wanted = [f"StudyInstanceUID={made.StudyInstanceUID}", f"SeriesInstanceUID={made.SeriesInstanceUID}"]
    keys = ["-k", "QueryRetrieveLevel=SERIES", *(w for k in wanted for w in ("-k", k))]
    run(
        "movescu",
        "-S",
        "-aet",
        "MEDMAE",
        "-aem",
        "MEDMAE",
        "+P",
        str(orthanc.move_port),
        "+xe",
        *keys,
        "-od",
        str(tmp_path),
        *server,
    )
    assert_unchanged(study.synthetic, list(tmp_path.iterdir()))


@pytest.mark.parametrize("by", ["get", "move"])
def test_medmae_sends_finds_and_retrieves_the_study(orthanc: Running, study: Study, tmp_path: Path, by: str) -> None:
    archive = orthanc.archive
    everything = [*study.source, *study.synthetic, study.segmentation]
    sent = archive.send(everything)
    assert not sent.problems and len(sent.stored) + len(sent.present) == len(everything)
    again = archive.send(everything)
    assert not again.stored and len(again.present) == len(everything)

    uid = pydicom.dcmread(study.source[0]).StudyInstanceUID
    found = archive.find_studies(date(2024, 3, 1), date(2024, 3, 31), modality="MR")
    assert [one.uid for one in found] == [uid]
    assert set(found[0].modalities) == {"MR", "SEG"} and found[0].instances == len(everything)
    assert not archive.find_studies(date(2024, 4, 1))
    assert {one.modality for one in archive.find_series(found[0])} == {"MR", "SEG"}

    got = archive.retrieve(found[0], tmp_path / "got", by=by, listen=orthanc.move_port)  # type: ignore[arg-type]
    assert not got.problems and got.fetched == len(everything)
    assert_unchanged(everything, list(got.files))
    got.files[3].unlink()  # as after an interruption
    resumed = archive.retrieve(found[0], tmp_path / "got", by=by, listen=orthanc.move_port)  # type: ignore[arg-type]
    assert resumed.fetched == 1 and resumed.files == got.files
    only = archive.retrieve(found[0], tmp_path / "seg", modality="SEG", by=by, listen=orthanc.move_port)  # type: ignore[arg-type]
    assert_unchanged([study.segmentation], list(only.files))


def test_the_pipeline_gives_every_study_of_the_archive_what_it_lacks(orthanc: Running, tmp_path: Path) -> None:
    import sys

    from tests.cohort.test_dicom import study as scans
    from tests.nnunet.conftest import model_of

    model_of("bm-mae").save_pretrained(tmp_path / "run")
    scans(tmp_path / "in", "t1", "t2", patient="PIPELINE")
    sent = orthanc.archive.send(sorted((tmp_path / "in").rglob("*.dcm")))
    assert not sent.problems
    script = Path(__file__).parents[3] / "pipelines" / "clinical_missing_modality.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), "--checkpoint", str(tmp_path / "run")]
    command += ["--archive", "127.0.0.1", orthanc.port, "--title", "TEST", "--target", "flair"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    done = [line for line in lines if line["status"] == "done" and line["sent"]]
    assert done, shown.stdout + shown.stderr
    uid = pydicom.dcmread(next((tmp_path / "in").rglob("*.dcm"))).StudyInstanceUID
    series = orthanc.archive.find_series(uid)
    assert len(series) == 3
    back = orthanc.archive.retrieve(uid, tmp_path / "back").files
    synthetic = [path for path in back if pydicom.dcmread(path).get("SyntheticData") == "YES"]
    made = sorted((tmp_path / "out" / "made").rglob("*.dcm"))
    ours = [path for path in made if pydicom.dcmread(path).StudyInstanceUID == uid]
    assert_unchanged(ours, synthetic)
    assert not any((tmp_path / "out" / "fetched").iterdir())
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not [line for line in again.stdout.splitlines() if json.loads(line)["status"] == "done"]
