"""The reference pages name everything there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer.main

import medmae
from medmae.cli import app
from medmae.plan import Plan, keys_of

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SHARED = {"--help", "--json", "--debug"}  # said once, at the top of the page


def commands() -> dict[str, set[str]]:
    """{command: its long options}, as the command line itself knows them."""
    found = {}

    def walk(command: object, name: str) -> None:
        children = getattr(command, "commands", None)
        if children:
            for child, below in children.items():
                walk(below, f"{name} {child}")
            return
        options = {
            option
            for parameter in command.params  # type: ignore[attr-defined]
            for option in (parameter.secondary_opts or parameter.opts)  # of a pair, the one that changes something
            if option.startswith("--")
        }  # type: ignore[attr-defined]
        found[name] = options

    walk(typer.main.get_command(app), "medmae")
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_and_option_is_described(command: str) -> None:
    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"no section on {command}"
    described = set(re.findall(r"--[a-z][a-z-]*", section[1]))
    options = commands()[command]
    assert options - SHARED <= described
    assert described <= options


def test_every_plan_field_is_described() -> None:
    from importlib import import_module

    from medmae.models.zoo import methods

    modules = [import_module(f"medmae.models.{name.replace('-', '_')}") for name in methods()]
    text = (REFERENCE / "plans.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*)`", text))
    sections = {
        "image",
        "image.intensity",
        "model",
        "masking",
        "sampling",
        "augmentation",
        "training",
        "reconstruction",
        "finetuning",
        "refining",
    }
    fields = set(keys_of(Plan)) - sections | {
        f"model.{name}" for module in modules for name in module.Config.model_fields
    }
    assert fields <= described
    dotted = {name for name in described if "." in name and name.partition(".")[0] in sections}
    assert dotted <= fields


def test_defaults_of_plan_fields_are_the_real_ones() -> None:
    text = (REFERENCE / "plans.md").read_text(encoding="utf-8")
    plan = Plan(name="x", method="bm-mae", modalities=("t1",))
    rows = re.findall(r"^\| `([a-z_]+)\.([a-z_]+)` \| ([^|]+) \|", text, re.MULTILINE)
    told = {(section, leaf): json.loads(value.strip(" `")) for section, leaf, value in rows if section != "model"}
    assert len(told) > 20
    real = plan.model_dump(mode="json")
    assert told == {(section, leaf): real[section][leaf] for section, leaf in told}


def test_every_public_name_is_described() -> None:
    text = (REFERENCE / "python.md").read_text(encoding="utf-8")
    table = text[text.index("## All names") :]
    assert set(medmae.__all__) - {"__version__"} <= set(re.findall(r"`([A-Za-z_]+)`", table))


def test_every_shipped_plan_is_described() -> None:
    text = (REFERENCE / "plans.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert all(f"`{name}`" in rows for name in medmae.available_plans())
