"""What `import medmae` costs, and what the installed package brings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import medmae

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "monai", "nibabel", "SimpleITK", "matplotlib", "nilearn", "torchio", "scipy", "sklearn", "skimage")


def run_python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def best_seconds(*arguments: str, times: int = 3) -> float:
    """The fastest of a few runs: what the program needs, without what the machine was doing besides."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_import_is_light() -> None:
    loaded = run_python("import sys, medmae; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert not set(HEAVY) & set(loaded)


def test_help_loads_no_heavy_library() -> None:
    code = "import sys\nfrom medmae.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert not set(HEAVY) & loaded


def test_import_takes_less_than_two_seconds() -> None:
    assert best_seconds("-c", "import medmae") < 2


def test_help_answers_in_less_than_a_second() -> None:
    assert best_seconds("-m", "medmae", "--help") < 1


@pytest.mark.parametrize("name", [name for name in medmae.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(medmae, name)
    assert callable(value)
    assert (value.__doc__ or "").strip()


def test_public_functions_stay_functions_when_a_module_has_their_name() -> None:
    code = (
        "import importlib, medmae\n"
        "for name, home in medmae._HOME.items():\n"
        "    importlib.import_module(home)\n"
        "print(*[name for name in medmae._HOME if not callable(getattr(medmae, name))])"
    )
    assert run_python(code) == ""


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        medmae.no_such_name  # noqa: B018


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_plans_and_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"medmae/plans/{path.name}" for path in (ROOT / "plans").glob("*.json")}
    assert shipped
    assert shipped <= names
    assert "medmae/py.typed" in names
    viewer = {path.name for path in (ROOT / "medmae/synthesis/viewer").iterdir()}
    assert {"niivue.min.js", "niivue.NOTICE.txt"} <= viewer  # what reports embed, and its licences
    assert {f"medmae/synthesis/viewer/{name}" for name in viewer} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "pipelines"))]


def test_plans_are_found_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import medmae\n"
        "print(medmae.__file__, medmae.Plan.load('bm-mae-base').name)"
    )
    file, name = run_python(code).split()
    assert Path(file).is_relative_to(tmp_path)
    assert name == "bm-mae-base"
