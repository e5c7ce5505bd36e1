"""Every study of an inbox or an archive gets the modality it lacks, as a series marked synthetic, and keeps it.

    python pipelines/clinical_missing_modality.py OUT --checkpoint RUN --folder INBOX [--target flair]
    python pipelines/clinical_missing_modality.py OUT --checkpoint RUN --archive HOST PORT --since 2026-01-01

INBOX holds a folder or a ZIP a delivery. From an archive, studies of MR since that day are fetched, and what was made
is sent back (``pip install "medmae[archive]"``); over TLS with ``--tls AUTHORITY.pem [--certificate OUR.pem --key
OUR.key]``. Each is done by itself: one that fails is named with its reason, and the others go on. ``OUT/log.jsonl`` has
a line a study, with hashes in place of identifiers; run it again after an interruption, or every night, and it goes on
with what is not there yet. Exit code 1: some failed; 2: nothing could begin.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import medmae
from medmae.imaging.dicom_out.archive import Archive, tls_context

DONE, NOTHING, FAILED = "done", "nothing to do", "failed"


def main(
    out: Path, checkpoint: Path, folder: Path | None, archive: Archive | None, since: date | None, targets: list[str]
) -> int:
    """The number of studies that failed."""
    out.mkdir(parents=True, exist_ok=True)
    model = medmae.load(checkpoint)
    finished = {line["study"] for line in read(out / "log.jsonl") if line["status"] != FAILED}
    failed = 0
    for key, fetch in deliveries(out, folder, archive, since):
        if key in finished:
            continue
        started = time.perf_counter()
        line = {"study": key, **one(key, fetch, model, out, archive, targets)}
        line["seconds"] = round(time.perf_counter() - started, 1)
        with (out / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        failed += line["status"] == FAILED
    return failed


def deliveries(
    out: Path, folder: Path | None, archive: Archive | None, since: date | None
) -> Iterator[tuple[str, Any]]:
    """(key, a function that gives the folder or ZIP) of everything there is; keys tell nobody's name."""
    if folder is not None:
        for path in sorted(folder.iterdir()):
            if path.is_dir() or path.suffix.lower() == ".zip":
                yield sha256(path.name.encode()).hexdigest()[:16], lambda path=path: path
    if archive is not None:
        for study in archive.find_studies(since, modality="MR"):
            place = out / "fetched" / study.key

            def fetch(study: Any = study, place: Path = place) -> Path:
                got = archive.retrieve(study, place, modality="MR")
                if got.problems:
                    raise medmae.InputError("the archive did not give the whole study", problems=got.problems)
                return place

            yield study.key, fetch


def one(key: str, fetch: Any, model: Any, out: Path, archive: Archive | None, targets: list[str]) -> dict[str, Any]:
    """Fetch, synthesise, send back; what the log says of it."""
    place = out / "made" / key
    try:
        made = medmae.reconstruct([fetch()], model, place, targets=targets, format="dicom", report=True)
    except medmae.MedmaeError as error:
        lacks_nothing = all("lacks no modality" in problem.what for problem in error.problems)
        return {"status": NOTHING} if lacks_nothing else {"status": FAILED, "problems": told(error.problems)}
    files = [file for series in made.written for file in sorted(series.iterdir())]
    line: dict[str, Any] = {"status": DONE, "series": [series.name for series in made.written]}
    problems = [*made.failed, *made.warnings]
    if archive is not None:
        sent = archive.send(files)
        line |= {"sent": len(sent.stored), "there_before": len(sent.present)}
        problems += sent.problems
        shutil.rmtree(out / "fetched" / key)  # patients' images stay no longer than they are needed
    if made.failed or (archive is not None and sent.problems):
        line["status"] = FAILED
    return {**line, "problems": told(problems)}


def told(problems: list[Any]) -> list[str]:
    """What is wrong, without where: folders are often called after patients."""
    return [": ".join(part for part in (problem.field, problem.what, problem.remedy) if part) for problem in problems]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--archive", nargs=2, metavar=("HOST", "PORT"))
    parser.add_argument("--title", default="ANY-SCP")
    parser.add_argument("--own-title", default="MEDMAE")
    parser.add_argument(
        "--tls", type=Path, metavar="AUTHORITY", help="PEM file of who signed the archive's certificate"
    )
    parser.add_argument("--certificate", type=Path, help="PEM file that shows the archive who we are")
    parser.add_argument("--key", type=Path, help="PEM file of its key")
    parser.add_argument("--since", type=date.fromisoformat)
    parser.add_argument("--target", action="append", default=[])
    options = parser.parse_args()
    if (options.folder is None) == (options.archive is None):
        parser.error("name either --folder or --archive")
    if options.tls is None and (options.certificate or options.key):
        parser.error("--certificate and --key go with --tls")
    try:
        found = None
        if options.archive:
            host, port = options.archive
            tls = tls_context(options.tls, options.certificate, options.key) if options.tls else None
            found = Archive(host, int(port), options.title, own_title=options.own_title, tls=tls)
        failed = main(options.out, options.checkpoint, options.folder, found, options.since, options.target)
    except medmae.MedmaeError as error:  # no checkpoint, no certificate, no answer: nothing could begin
        parser.exit(2, f"{error}\n")
    sys.exit(failed > 0)
