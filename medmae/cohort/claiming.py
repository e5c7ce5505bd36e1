"""The folder of a prepared cohort before it is written: is it ours, for this image space, and nobody else's now?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from medmae.cohort.index import AGAIN, read_json
from medmae.cohort.prepared import is_cohort
from medmae.cohort.sources import image_digest
from medmae.errors import InputError
from medmae.files import explained
from medmae.plan import Image

_OURS: Final = {"cohort.json", "studies", ".building", ".lock"}


def refuse_other_content(out: Path, image: Image) -> None:
    """Raise when ``out`` holds anything but a cohort for the same image space."""
    if not out.exists():
        return
    with explained(out):
        if not out.is_dir():
            raise NotADirectoryError(20, "not a folder", str(out))
        foreign = sorted(path.name for path in out.iterdir() if path.name not in _OURS)
    if foreign and not is_cohort(out):
        raise InputError(
            "this folder is not empty and is no prepared cohort",
            where=out,
            field="--out",
            found=", ".join(foreign[:3]),
            remedy="Choose an empty or a new folder.",
        )
    if not is_cohort(out):
        return
    stored = read_json(out / "cohort.json", AGAIN)
    if stored.get("image_digest") != image_digest(image):
        old, new = stored.get("image") or {}, image.model_dump(mode="json")
        changed = [key for key in new if key != "crop" and old.get(key) != new[key]] or ["image"]
        raise InputError(
            "this cohort was prepared for another image space",
            where=out,
            field=", ".join(f"image.{key}" for key in changed),
            found=", ".join(str(old.get(key)) for key in changed),
            expected=", ".join(str(new.get(key)) for key in changed),
            remedy="Choose another folder with -o, or delete this one.",
        )


def make_folder(path: Path) -> None:
    try:
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "this folder cannot be made", where=path, found=error.strerror, remedy="Choose another folder with -o."
        ) from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the cohort's lock; the system lets go of it however this process ends."""
    with explained(out), open(out / ".lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows; renames alone keep the store whole there
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "another `medmae prepare` is writing this cohort",
                where=out,
                remedy="Wait for it to end, then run this again.",
            ) from None
        except OSError:  # a file system without locks; renames alone keep the store whole there
            pass
        yield
