"""Studies in an nnU-Net raw dataset: ``dataset.json``, ``imagesTr/<case>_0000.nii.gz``, ``labelsTr/<case>.nii.gz``.

``channel_names`` says which modality ``_0000`` is. A name that no modality has ("MRI") is not guessed at: it is kept
as a modality of its own ("mri"), with a warning that says how a plan can use it. ``imagesTs`` is left out of a data
set's studies, so that nothing learns from test images unasked; give ``DATASET/imagesTs`` itself to get those. The
explicit file list that ``dataset.json`` may hold (``"dataset"``) and the Medical Segmentation Decathlon's older format
with one channel are read too.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from medmae.cohort.folders import CONVERT, single_files
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.naming import IMAGE_SUFFIXES, modality_name, safe_id
from medmae.cohort.study import Study
from medmae.errors import InputError, Problem

_CHANNEL: Final = re.compile(r"(.+)_(\d{4})")
_IMAGE_FOLDERS: Final = ("imagesTr", "imagesTs")


@dataclass
class Dataset:
    """What ``dataset.json`` says. ``label_values`` is None when it names no labels."""

    root: Path
    channels: dict[int, str]
    file_ending: str
    label_values: frozenset[int] | None
    listed: Mapping[str, Mapping[str, Any]] | None
    problems: list[Problem] = field(default_factory=list)


def nnunet_root(data: Path) -> Path | None:
    """The dataset that ``data`` is, or is the image folder of, or the only one in it; None when there is none.

    Raises :class:`InputError` when ``data`` holds several (nnU-Net's folder of raw datasets).
    """
    data = data.resolve()
    inner = [file.parent for file in sorted(data.glob("Dataset*/dataset.json"))]
    if len(inner) > 1:
        raise InputError(
            "several nnU-Net datasets",
            where=data,
            field="DATA",
            found=", ".join(folder.name for folder in inner),
            remedy="Give one of them.",
        )
    if inner:
        return inner[0]
    for root in (data, data.parent):
        if (root / "dataset.json").is_file() and any((root / name).is_dir() for name in _IMAGE_FOLDERS):
            return root if root == data or data.name in _IMAGE_FOLDERS else None
    return None


def find_in_nnunet(data: Path, root: Path) -> tuple[list[Study], list[Problem], frozenset[int] | None]:
    """(studies, problems, the label values that may occur) of the dataset ``root``, or of its folder ``data``."""
    dataset = read_dataset(root)
    problems = dataset.problems
    data = data.resolve()
    if data.name in _IMAGE_FOLDERS:
        folder = data
    else:
        folder = root / ("imagesTr" if (root / "imagesTr").is_dir() else "imagesTs")
        if folder.name == "imagesTr":
            tell_of_test_images(dataset)
    cases = cases_in(folder, dataset) if dataset.listed is None or folder.name == "imagesTs" else listed_cases(dataset)
    studies = []
    for case, (images, labels) in sorted(cases.items()):
        complete = single_files(safe_id(case), images, labels, problems)
        if complete is not None:
            studies.append(Study(safe_id(case), safe_id(case), complete[0], None, complete[1]))
    return studies, problems, dataset.label_values


def tell_of_test_images(dataset: Dataset) -> None:
    """That ``imagesTs`` is left out, where there is one."""
    folder = dataset.root / "imagesTs"
    names = [stem(file, dataset) for file in images_in(folder, dataset, [])] if folder.is_dir() else []
    if names:
        cases = {match[1] if (match := _CHANNEL.fullmatch(name)) else name for name in names}
        dataset.problems.append(
            Problem(
                "test images are left out",
                str(folder),
                found=f"{len(cases)} cases",
                remedy=f"To use them, give {folder} as DATA.",
                fatal=False,
            )
        )


Cases = dict[str, tuple[dict[str, list[Path]], dict[str, list[Path]]]]


def cases_in(folder: Path, dataset: Dataset) -> Cases:
    """{case: (images, labels)} by file name."""
    cases: Cases = defaultdict(lambda: (defaultdict(list), {}))
    files = images_in(folder, dataset, dataset.problems)
    for path in files:
        name = stem(path, dataset)
        match = _CHANNEL.fullmatch(name)
        if match is None and len(dataset.channels) > 1:
            dataset.problems.append(
                Problem(
                    "the name has no channel number: left out",
                    str(path),
                    expected=f"{name}_0000{dataset.file_ending}",
                    remedy="Convert a Decathlon dataset with nnUNetv2_convert_MSD_dataset.",
                    fatal=False,
                )
            )
            continue
        case, channel = (match[1], int(match[2])) if match else (name, min(dataset.channels))
        if channel not in dataset.channels:
            dataset.problems.append(
                Problem(
                    "a channel that dataset.json does not name: left out",
                    str(path),
                    "channel_names",
                    found=f"{channel:04d}",
                    expected=", ".join(f"{number:04d}" for number in sorted(dataset.channels)),
                    remedy="Add it to channel_names.",
                    fatal=False,
                )
            )
            continue
        cases[case][0][dataset.channels[channel]].append(path)
    label_folder = dataset.root / folder.name.replace("images", "labels")
    if label_folder.is_dir():
        for path in images_in(label_folder, dataset, dataset.problems):
            case = stem(path, dataset)
            if case in cases:
                cases[case][1]["seg"] = [path]
            else:
                dataset.problems.append(
                    Problem("a label without images: left out", str(path), remedy="Check its name.", fatal=False)
                )
    return cases


def listed_cases(dataset: Dataset) -> Cases:
    """{case: (images, labels)} of the file list in dataset.json, whose paths are relative to the dataset."""
    cases: Cases = {}
    for case, files in (dataset.listed or {}).items():
        images: dict[str, list[Path]] = defaultdict(list)
        paths = files.get("images", []) if isinstance(files, Mapping) else []
        for channel, path in zip(sorted(dataset.channels), paths, strict=False):
            images[dataset.channels[channel]].append(dataset.root / path)
        label = files.get("label") if isinstance(files, Mapping) else None
        if images:
            cases[case] = (images, {"seg": [dataset.root / label]} if label else {})
        else:
            dataset.problems.append(
                Problem("a case without images", str(dataset.root / "dataset.json"), f"dataset.{case}", fatal=False)
            )
    return cases


def images_in(folder: Path, dataset: Dataset, problems: list[Problem]) -> list[Path]:
    """The files with the dataset's ending; images with another one are reported."""
    fitting = []
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        problems.append(
            Problem("this folder cannot be read", str(folder), found=error.strerror, remedy="Change its permissions.")
        )
        return []
    for path in files:
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.name.endswith(dataset.file_ending):
            fitting.append(path)
        elif path.suffix != ".json":
            problems.append(
                Problem(
                    "another ending than dataset.json says: left out",
                    str(path),
                    "file_ending",
                    expected=dataset.file_ending,
                    remedy="Convert or remove it.",
                    fatal=False,
                )
            )
    return fitting


def stem(path: Path, dataset: Dataset) -> str:
    return path.name[: -len(dataset.file_ending)]


def read_dataset(root: Path) -> Dataset:
    """``dataset.json``, checked. Raises :class:`InputError` when nothing can be read without mending it."""
    path = root / "dataset.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            "this dataset.json is not readable", where=path, found=error, remedy="Mend the file."
        ) from None
    names = (data.get("channel_names") or data.get("modality")) if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names or not all(str(key).isdigit() for key in names):
        raise InputError(
            "dataset.json does not say what the channels are",
            where=path,
            field="channel_names",
            found=json.dumps(names),
            expected='{"0": "T1", "1": "FLAIR"}',
            remedy="Add channel_names.",
        )
    ending = data.get("file_ending", ".nii.gz")
    if str(ending).lower() not in IMAGE_SUFFIXES:
        raise InputError(
            "images of this format are not read",
            where=path,
            field="file_ending",
            found=ending,
            expected=" or ".join(IMAGE_SUFFIXES),
            remedy=CONVERT,
        )
    dataset = Dataset(root, {}, ending, label_values(data.get("labels")), None)
    if isinstance(data.get("dataset"), dict):
        dataset.listed = data["dataset"]
    name_channels(dataset, {int(key): str(name) for key, name in names.items()}, path)
    return dataset


def name_channels(dataset: Dataset, names: dict[int, str], path: Path) -> None:
    """Fill in the channels' modalities; refuse two of one name, warn of names that no modality has."""
    for number, name in sorted(names.items()):
        modality = modality_name(name)
        taken = [names[other] for other, given in dataset.channels.items() if given == modality]
        if modality is None or taken:
            raise InputError(
                "every channel needs a name of its own",
                where=path,
                field=f"channel_names.{number}",
                found=f"{name!r}" + (f", which is the same modality as {taken[0]!r}" if taken else ""),
                remedy="Name the channels by modality, such as T1, T1c, T2, FLAIR, CT.",
            )
        dataset.channels[number] = modality
        if canonical_modality(name) is None:
            dataset.problems.append(own_modality(name, modality, str(path), f"channel_names.{number}"))


def own_modality(name: str, modality: str, where: str, field: str) -> Problem:
    """The warning for a name that is kept as a modality of its own."""
    return Problem(
        f"no known modality is called {name!r}: kept as a modality of its own, {modality!r}",
        where,
        field,
        remedy=f"If it is T1, T2, CT, ..., rename it so; else plan for it: --set 'modalities=[\"{modality}\"]'.",
        fatal=False,
    )


def label_values(labels: object) -> frozenset[int] | None:
    """The values in ``labels``: {"background": 0, "tumor": 1}, with regions as lists, or the Decathlon's inverse."""
    if not isinstance(labels, dict):
        return None
    values: set[int] = set()
    for name, value in labels.items():
        candidates: Iterable[object] = value if isinstance(value, list | tuple) else (value,)
        if isinstance(value, str) and str(name).isdigit():
            candidates = (name,)
        values |= {int(str(item)) for item in candidates if re.fullmatch(r"-?\d+", str(item))}
    return frozenset(values | {0})
