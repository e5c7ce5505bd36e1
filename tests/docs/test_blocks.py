"""The code blocks of the documentation and the README do what they say.

Python blocks run, page by page, in a folder with the files that the pages name. Commands in shell blocks are parsed by
the real command line, and their arguments bound to the real functions, which are then not called.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import medmae
from medmae.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = (
    *["demo", "inspect", "prepare", "pretrain", "reconstruct", "evaluate_synthesis", "evaluate_features"],
    *["import_weights", "export", "benchmark", "finetune_segment", "predict_segment", "write_plans", "make_dataset"],
    *["finetune_classify", "finetune_survive", "finetune_synthesis", "predict_outcome", "predict_features"],
)


class Block(NamedTuple):
    page: Path
    line: int
    info: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced code blocks of a page; ``not run`` where a comment on the line before says why."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^(<!-- not run: .+ -->\n)?```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        info = f"{found[2].strip()}{' not run' if found[1] else ''}"
        yield Block(page, text.count("\n", 0, found.start(3)) + 1, info, found[3])


ALL = [block for page in PAGES for block in blocks(page)]
PYTHON_PAGES = [page for page in PAGES if any(block.info == "python" for block in blocks(page))]
SHELL_LINES = [
    pytest.param(line, id=f"{block.name} {line[:50]}")
    for block in ALL
    if block.info in ("shell", "bash")
    for line in block.text.replace("\\\n", " ").splitlines()
    if re.search(r"\bmedmae(\.cli)? [a-z]", line) and not line.startswith(("git ", "#"))
]


def test_every_block_says_what_it_is() -> None:
    known = {"python", "python not run", "shell", "shell not run", "bash", "text", "json"}
    assert not [block.name for block in ALL if block.info not in known]
    assert len(SHELL_LINES) > 20
    assert len(PYTHON_PAGES) >= 5


def write_study(folder: Path, modalities: tuple[str, ...], seed: int) -> None:
    """A small made-up head: an ellipsoid with some structure, background 0."""
    import nibabel as nib

    noise = np.random.default_rng(seed)
    shape = (52, 56, 48)
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.9
    folder.mkdir(parents=True)
    for number, modality in enumerate(modalities):
        values = 300 + 60 * np.sin(4 * axes[number % 3] + number) + 10 * noise.standard_normal(shape)
        image = nib.Nifti1Image((values * inside).astype(np.float32), np.diag([1.5, 1.5, 1.5, 1]))
        nib.save(image, folder / f"{modality}.nii.gz")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SCANS, STUDY and RUN, as the pages call them."""
    folder = tmp_path_factory.mktemp("documentation")
    everything = ("t1", "t1c", "t2", "flair")
    for number in range(4):
        write_study(folder / "SCANS" / f"patient-{number}", everything[: 4 - (number == 1)], number)
    write_study(folder / "STUDY", ("t1", "t1c", "t2"), 9)
    grades = "".join(f"patient-{number},{'high' if number % 2 else 'low'}\n" for number in range(4))
    (folder / "labels.csv").write_text(f"study,grade\n{grades}")
    medmae.pretrain(folder / "SCANS", "bm-mae-tiny", folder / "RUN", max_steps=1, device="cpu", progress=False)
    return folder


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    shutil.copytree(material, here)
    monkeypatch.chdir(here)
    names: dict[str, Any] = {"__name__": "a page"}
    for block in blocks(page):
        if block.info == "python":
            # Blank lines before the code, so that a traceback points into the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def commands_in(line: str) -> list[str]:
    """The arguments of medmae in a shell line: what follows its name, up to a redirection or pipe."""
    words = shlex.split(line, comments=True)
    start = next(number for number, word in enumerate(words) if word in ("medmae", "medmae.cli"))
    arguments = words[start + 1 :]
    end = next((number for number, word in enumerate(arguments) if word in (">", "|", "&&")), len(arguments))
    return arguments[:end]


def bound(name: str) -> Callable[..., None]:
    """Checks that the public function ``name`` takes the arguments, and ends the command instead of running it."""

    def check(*arguments: Any, **options: Any) -> None:
        function = getattr(importlib.import_module(medmae._HOME[name]), name)
        inspect.signature(function).bind(*arguments, **options)
        raise typer.Exit(77)

    return check


@pytest.mark.parametrize("line", SHELL_LINES)
def test_commands_are_ones_that_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        monkeypatch.setitem(vars(medmae), name, bound(name))
    arguments = commands_in(line)
    shown = CliRunner().invoke(app, arguments)
    shows = arguments[0] == "plans" or arguments[:2] == ["nnunet", "path"] or {"--help", "--version"} & set(arguments)
    expected = 0 if shows else 77
    assert shown.exit_code == expected, shown.output


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"^make ([a-z-]+)$|`make ([a-z-]+)`", text, re.MULTILINE))
    flat = {name for pair in named for name in pair if name}
    assert {"demo", "test"} <= flat
    assert flat <= targets


def test_pictures_and_links_of_the_readme_exist() -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    paths = [path for path in re.findall(r"\]\(([^)#]+)", text) if "://" not in path]
    assert len(paths) > 4
    assert not [path for path in paths if not (ROOT / path).exists()]
