"""The command line's contract: exit codes, where things are printed, and messages instead of tracebacks.

The public functions are replaced by recorders here; what they do is tested beside them, and the documentation's
tests run the real ones.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import medmae
from medmae.cli import app
from medmae.console import is_first_process
from medmae.errors import InputError, MedmaeError, Problem

COMMANDS = {
    "demo": [],
    "plans": [],
    "inspect": ["DATA"],
    "prepare": ["DATA", "--plan", "bm-mae-base", "-o", "OUT"],
    "pretrain": ["DATA", "--plan", "bm-mae-base", "-o", "OUT"],
    "reconstruct": ["STUDY", "--checkpoint", "RUN", "-o", "OUT"],
    "evaluate synthesis": ["DATA", "--checkpoint", "RUN", "-o", "OUT"],
    "import": ["FILE", "-o", "OUT"],
    "benchmark": ["--plan", "bm-mae-base"],
}
FUNCTIONS = {
    "demo": "demo",
    "inspect": "inspect",
    "prepare": "prepare",
    "pretrain": "pretrain",
    "reconstruct": "reconstruct",
    "evaluate synthesis": "evaluate_synthesis",
    "import": "import_weights",
    "benchmark": "benchmark",
}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@dataclass
class Recorder:
    """Stands for a public function: remembers its arguments, returns or raises what it was given."""

    answer: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


Replace = Callable[[str, Any], Recorder]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    def put(name: str, answer: Any) -> Recorder:
        recorder = Recorder(answer)
        monkeypatch.setitem(vars(medmae), name, recorder)  # without importing what it stands for
        return recorder

    return put


def result(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields, to_json=lambda: {"made": "by a test"})


def prepared(done: list[str], skipped: list[str], failed: list[Problem]) -> SimpleNamespace:
    return result(cohort_path=Path("OUT"), done=done, skipped=skipped, failed=failed, warnings=[])


BAD_STUDY = Problem("voxels that are not finite", where="sub-02/t1.nii.gz", remedy="Leave the study out.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    shown = invoke(*command.split(), "--help")
    assert shown.exit_code == 0
    assert f"Example: medmae {command}" in " ".join(shown.output.split())
    assert "--json" in shown.output


def test_help_lists_every_command() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    for command in COMMANDS:
        assert command.split()[0] in shown.output


def test_version() -> None:
    assert invoke("--version").output.strip() == f"medmae {medmae.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["pretrain"],
        ["pretrain", "DATA", "--plan", "bm-mae-base"],
        ["pretrain", "DATA", "--plan", "bm-mae-base", "-o", "RUN", "--no-such-option"],
        ["pretrain", "DATA", "--plan", "bm-mae-base", "-o", "RUN", "--max-steps", "0"],
        ["pretrain", "DATA", "--plan", "bm-mae-base", "-o", "RUN", "--max-steps", "many"],
        ["pretrain", "DATA", "--plan", "bm-mae-base", "-o", "RUN", "--device", "tpu"],
        ["pretrain", "DATA", "--plan", "bm-mae-base", "-o", "RUN", "--precision", "16"],
        ["reconstruct", "S", "--checkpoint", "RUN", "-o", "O", "--format", "png"],
        ["reconstruct", "S", "--checkpoint", "RUN", "-o", "O", "--image", "t1.nii.gz"],
        ["reconstruct", "S", "--checkpoint", "RUN", "-o", "O", "--image", "t1=a", "--image", "t1=b"],
    ],
)
def test_wrong_use_exits_2_without_traceback(arguments: list[str]) -> None:
    shown = invoke(*arguments)
    assert shown.exit_code == 2
    assert "Traceback" not in shown.output
    assert shown.stderr.strip()


@pytest.mark.parametrize("command", FUNCTIONS)
def test_input_errors_exit_2_naming_every_problem(command: str, replace: Replace) -> None:
    other = Problem("a duplicate study id", where="sub-03")
    replace(FUNCTIONS[command], InputError("nothing usable", problems=[BAD_STUDY, other]))
    shown = invoke(*command.split(), *COMMANDS[command])
    assert shown.exit_code == 2
    assert "Traceback" not in shown.output
    assert shown.stdout == ""
    assert "sub-02/t1.nii.gz: voxels that are not finite. Leave the study out." in shown.stderr
    assert "sub-03: a duplicate study id" in shown.stderr


def test_debug_shows_the_traceback(replace: Replace) -> None:
    replace("inspect", InputError("nothing usable"))
    assert "Traceback" in invoke("inspect", "DATA", "--debug").stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "OUT/x"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "OUT/x"), "permission"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "DATA/x"), "DATA/x: no such file"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_said_plainly(error: Exception, said: str, replace: Replace) -> None:
    replace("prepare", error)
    shown = invoke("prepare", *COMMANDS["prepare"])
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert "fault in medmae" not in shown.stderr
    assert "Traceback" not in shown.output


def test_our_own_faults_say_how_to_report_them(replace: Replace) -> None:
    replace("inspect", RuntimeError("index 3 is out of bounds\nsecond line"))
    shown = invoke("inspect", "DATA")
    assert shown.exit_code == 2
    assert "RuntimeError: index 3 is out of bounds" in shown.stderr
    assert "--debug" in shown.stderr
    assert "Traceback" not in shown.output
    assert "Traceback" in invoke("inspect", "DATA", "--debug").stderr


def test_an_interruption_is_tidy(replace: Replace) -> None:
    replace("prepare", KeyboardInterrupt())
    shown = invoke("prepare", *COMMANDS["prepare"])
    assert shown.exit_code == 130
    assert "interrupted" in shown.stderr
    assert "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("done", "skipped", "failed", "code"),
    [
        (["a", "b"], [], [], 0),
        ([], ["a", "b"], [], 0),
        (["a"], [], [BAD_STUDY], 1),
        ([], ["a"], [BAD_STUDY], 1),
        ([], [], [BAD_STUDY], 2),
    ],
)
def test_prepare_exit_code(
    done: list[str], skipped: list[str], failed: list[Problem], code: int, replace: Replace
) -> None:
    replace("prepare", prepared(done, skipped, failed))
    shown = invoke("prepare", *COMMANDS["prepare"])
    assert shown.exit_code == code
    assert ("sub-02/t1.nii.gz" in shown.stderr) == bool(failed)


@pytest.mark.parametrize(("usable", "failed", "code"), [(["a"], [], 0), (["a"], ["sub-02"], 1), ([], ["sub-02"], 2)])
def test_inspect_exit_code(usable: list[str], failed: list[str], code: int, replace: Replace) -> None:
    replace("inspect", result(usable=usable, failed=failed, problems=[BAD_STUDY] if failed else []))
    shown = invoke("inspect", "DATA")
    assert shown.exit_code == code
    assert ("sub-02/t1.nii.gz" in shown.stderr) == bool(failed)


def test_json_is_all_there_is_on_stdout(replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = replace("prepare", prepared(["a"], [], [BAD_STUDY]))

    def chatty(*arguments: Any, **options: Any) -> Any:
        print("a library that prints")
        options["on_progress"](1, 2, "a")
        return recorder(*arguments, **options)

    monkeypatch.setitem(vars(medmae), "prepare", chatty)
    shown = invoke("prepare", *COMMANDS["prepare"], "--json")
    assert json.loads(shown.stdout) == {"made": "by a test"}
    assert "a library that prints" in shown.stderr
    assert "sub-02/t1.nii.gz" in shown.stderr


def test_json_holds_no_nan(replace: Replace) -> None:
    trained = SimpleNamespace(run=Path("RUN"), steps=1, problems=[], interrupted=False)
    trained.to_json = lambda: {"metrics": {"loss": float("nan"), "psnr": [float("inf"), 1.5]}}
    replace("pretrain", trained)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    said = json.loads(invoke("pretrain", *COMMANDS["pretrain"], "--json").stdout, parse_constant=refuse)
    assert said == {"metrics": {"loss": None, "psnr": [None, 1.5]}}


def test_warnings_alone_are_no_failure(replace: Replace) -> None:
    warning = Problem("sform and qform differ", where="sub-01/t2.nii.gz", fatal=False)
    replace("inspect", result(usable=["sub-01"], failed=[], problems=[warning]))
    shown = invoke("inspect", "DATA")
    assert shown.exit_code == 0
    assert "warning: sub-01/t2.nii.gz" in shown.stderr


def test_pretrain_passes_every_option_on(replace: Replace) -> None:
    recorder = replace("pretrain", result(run=Path("RUN"), steps=7, problems=[], interrupted=False))
    shown = invoke(
        *["pretrain", "DATA", "--plan", "mine.json", "-o", "RUN", "--set", "training.lr=1", "--set", "model.width=6"],
        *["--max-steps", 7, "--checkpoint-every", 3, "--device", "cpu", "--precision", "bf16", "--devices", 2],
        *["--nodes", 4, "--strategy", "ddp", "--resume", "--init", "OTHER", "--seed", 5, "--coregister"],
    )
    assert shown.exit_code == 0
    assert recorder.calls == [
        (
            (Path("DATA"), "mine.json", Path("RUN")),
            {
                "overrides": ["training.lr=1", "model.width=6"],
                "max_steps": 7,
                "checkpoint_every": 3,
                "device": "cpu",
                "precision": "bf16",
                "devices": 2,
                "nodes": 4,
                "strategy": "ddp",
                "resume": True,
                "init": "OTHER",
                "seed": 5,
                "coregister": True,
            },
        )
    ]


def test_a_training_that_was_stopped_says_how_to_go_on(replace: Replace) -> None:
    replace("pretrain", result(run=Path("RUN"), steps=7, problems=[], interrupted=True))
    shown = invoke("pretrain", *COMMANDS["pretrain"])
    assert shown.exit_code == 130
    assert "--resume" in shown.stdout


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_only_the_first_process_of_a_training_prints(
    variables: dict[str, str], first: bool, replace: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    replace("pretrain", result(run=Path("RUN"), steps=7, problems=[], interrupted=False))
    assert bool(invoke("pretrain", *COMMANDS["pretrain"], "--json").stdout) == first
    assert is_first_process() == first


def test_reconstruct_reads_targets_and_images(replace: Replace) -> None:
    recorder = replace(
        "reconstruct", result(written=[Path("OUT/a_flair.nii.gz")], reports=[], failed=[], skipped=[], warnings=[])
    )
    shown = invoke(
        *["reconstruct", "A", "B", "--checkpoint", "RUN", "-o", "OUT", "--target", "flair", "--target", "t2"],
        *["--image", "t1=x/T1.nii.gz", "--image", "t1c=x/with=sign.nii.gz", "--report"],
        *["--coregister", "--reference", "t1"],
    )
    assert shown.exit_code == 0
    assert shown.stdout.strip() == "OUT/a_flair.nii.gz"
    ((studies, checkpoint, out), options) = recorder.calls[0]
    assert ([str(study) for study in studies], checkpoint, out) == (["A", "B"], "RUN", Path("OUT"))
    assert options["targets"] == ["flair", "t2"]
    assert options["images"] == {"t1": Path("x/T1.nii.gz"), "t1c": Path("x/with=sign.nii.gz")}
    assert options["report"] is True
    assert (options["coregister"], options["reference"]) == (True, "t1")


def test_reconstruct_keeps_the_good_and_names_the_bad(replace: Replace) -> None:
    bad = result(written=[Path("OUT/a_t2.nii.gz")], reports=[], failed=[BAD_STUDY], skipped=[], warnings=[])
    replace("reconstruct", bad)
    shown = invoke("reconstruct", *COMMANDS["reconstruct"])
    assert (shown.exit_code, shown.stdout.strip()) == (1, "OUT/a_t2.nii.gz")
    assert "sub-02/t1.nii.gz" in shown.stderr


def test_plans_lists_every_shipped_plan_in_one_line() -> None:
    lines = invoke("plans").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(medmae.available_plans())
    assert json.loads(invoke("plans", "--json").stdout).keys() == medmae.available_plans().keys()


def test_plans_shows_one_that_can_be_saved_and_used(tmp_path: Path) -> None:
    shown = invoke("plans", "bm-mae-base", "--set", "training.lr=0.5", "--set", "model.width=96")
    file = tmp_path / "mine.json"
    file.write_text(shown.stdout)
    plan = medmae.Plan.load(file)
    assert (plan.training.lr, plan.model["width"]) == (0.5, 96)
    assert plan == medmae.Plan.load("bm-mae-base", ["training.lr=0.5", "model.width=96"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bm-mae-bas"], "Did you mean 'bm-mae-base'?"),
        (["bm-mae-base", "--set", "training.lrr=1"], "training.lr"),
        (["bm-mae-base", "--set", "model.widht=96"], "model.width"),
        (["bm-mae-base", "--set", "training.lr"], "key=value"),
    ],
)
def test_misspelt_plans_and_fields_suggest_the_right_one(arguments: list[str], said: str) -> None:
    shown = invoke("plans", *arguments)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert said in shown.stderr


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = [sys.executable, "-m", "medmae", "plans", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()  # before anything can have been written
        said = running.stderr.read()
        assert running.wait(timeout=60) != 0
    assert said == ""


def test_errors_keep_long_paths_in_one_piece(replace: Replace) -> None:
    path = "/data/" + "a-long-folder-name/" * 20 + "t1.nii.gz"
    replace("inspect", MedmaeError("is truncated", where=path))
    assert f"{path}: is truncated" in invoke("inspect", "DATA").stderr


def test_brackets_in_paths_are_shown_as_they_are(replace: Replace) -> None:
    replace("inspect", MedmaeError("is truncated", where="[red]sub[01]/t1.nii.gz"))
    assert "[red]sub[01]/t1.nii.gz: is truncated" in invoke("inspect", "DATA").stderr
