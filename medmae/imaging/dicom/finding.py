"""The series in a folder tree, a ZIP or a file, by their headers; everything that is wrong with them in one pass."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from medmae.errors import Problem
from medmae.imaging.dicom.header import Instance, read_instance
from medmae.imaging.dicom.opening import File, Opener, folder_of, is_zip, read_errors
from medmae.imaging.dicom.series import Series
from medmae.imaging.dicom.sorting import Refusal, Sorted, sort_series
from medmae.imaging.dicom.zips import members_of
from medmae.imaging.files import walk


def find_series(path: str | Path) -> tuple[list[Series], list[Problem]]:
    """The volumes in a folder tree (with the ZIPs in it), a ZIP, or one file, in order of study and series number.

    Headers are read, no pixels, and nothing is written: members of a ZIP are judged first and then read in place. What
    is no DICOM image is passed over. Fatal problems name series that are damaged (slices missing or unevenly spaced,
    truncated, in a transfer syntax that cannot be decoded), studies that mix two patients or have two different objects
    of one SOPInstanceUID, and ZIPs that are not to be trusted; warnings what is merely no volume (localisers,
    screenshots, time series). Neither holds text, dates or UIDs of a header.
    """
    found = scan(Path(path))
    return found.series, [refusal.problem for refusal in found.refused]


def scan(path: Path) -> Sorted:
    """:func:`find_series`, with the study that each refusal belongs to."""
    instances, problems = read_all(path)
    result = Sorted(refused=[Refusal(problem, None) for problem in problems])
    studies: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        studies[instance.study].append(instance)
    for study in studies.values():
        one = sort_study(study)
        result.series += one.series
        result.refused += one.refused
    return result


def read_all(path: Path) -> tuple[list[Instance], list[Problem]]:
    """The DICOM images at ``path``, in order of their paths."""
    problems: list[Problem] = []
    instances = []
    with Opener() as opener:
        for file in candidates(path, problems):
            try:
                with opener.open(file) as stream:
                    instance = read_instance(stream, file, opener.size(file))
            except PermissionError:
                problems.append(Problem("no permission to read this file", str(file), remedy="Change its permissions."))
            except Exception:  # errors of files, of ZIPs, of pydicom, whose words may quote the header
                problems.append(damaged(file))
            else:
                if instance is not None:
                    instances.append(instance)
    return instances, problems


def damaged(file: File) -> Problem:
    return Problem("a DICOM file that cannot be read", str(file), remedy="Copy or export it again.")


def candidates(path: Path, problems: list[Problem]) -> Iterator[File]:
    """Every file that may be DICOM, ZIPs replaced by their members."""
    files = [path] if path.is_file() else (file for _, inner in walk(path, problems) for file in inner)
    for file in files:
        if is_zip(file):
            members, wrong = members_of(file)
            problems += wrong
            yield from members
        else:
            yield file


def sort_study(instances: Sequence[Instance]) -> Sorted:
    """The volumes of one study."""
    uid, where = instances[0].study, folder_of(instances[0].file)
    if not uid:
        problem = Problem("images that name no study", where, "StudyInstanceUID", found=f"{len(instances)} images")
        return Sorted(refused=[Refusal(problem, None)])
    if mixed := two_patients(instances):
        problem = Problem(
            f"one study holds images of two patients: {mixed} differ",
            where,
            found=f"{len(instances)} images",
            expected="one patient a study",
            remedy="Find out whose images these are; do not use them before.",
        )
        return Sorted(refused=[Refusal(problem, uid, whole=True)])
    unique, refused = without_copies(instances)
    if any(refusal.whole for refusal in refused):
        return Sorted(refused=refused)
    groups: dict[str, list[Instance]] = defaultdict(list)
    for instance in unique:
        groups[instance.series].append(instance)
    result = Sorted(refused=refused)
    for group in sorted(groups.values(), key=lambda group: (group[0].number or 0, str(group[0].file))):
        one = sort_series(group)
        result.series += one.series
        result.refused += one.refused
    return result


def two_patients(instances: Sequence[Instance]) -> str:
    """Which attributes say that images are of two patients; "" when none does. Empty ones say nothing."""
    names = ("PatientID", "IssuerOfPatientID", "PatientName")
    values = [{i.patient[place] for i in instances if i.patient[place]} for place in range(3)]
    return " and ".join(name for name, found in zip(names, values, strict=True) if len(found) > 1)


def without_copies(instances: Sequence[Instance]) -> tuple[list[Instance], list[Refusal]]:
    """One of each SOPInstanceUID: copies of a file are passed over with a warning, different objects are refused."""
    same: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        same[instance.sop or str(instance.file)].append(instance)
    several = [group for group in same.values() if len(group) > 1]
    copies = 0
    where, uid = folder_of(instances[0].file), instances[0].study
    with Opener() as opener:
        different = [group for group in several if len({digest(i.file, opener) for i in group}) > 1]
        copies = sum(len(group) - 1 for group in several)
    if different:
        told = ", ".join(str(i.file) for i in different[0][:2])
        problem = Problem(
            "different images have the same SOPInstanceUID",
            where,
            "SOPInstanceUID",
            found=f"{len(different)} times, the first {told}",
            expected="one image a UID",
            remedy="Find out which of them are right, and keep those.",
        )
        return [], [Refusal(problem, uid, whole=True)]
    if not copies:
        return list(instances), []
    what = "copies of files that are there already: passed over"
    warning = Problem(what, where, found=f"{copies} files", fatal=False)
    return [group[0] for group in same.values()], [Refusal(warning, uid)]


def digest(file: File, opener: Opener) -> str:
    """SHA-256 of a file's bytes; of one that cannot be read, its name."""
    try:
        with opener.open(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    except read_errors():
        return str(file)
