"""Methods by name: a method is a module of this folder, found by its name with dashes as underscores."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from medmae import models
from medmae.errors import PlanError, nearest
from medmae.models.base import MaskedAutoencoder
from medmae.plan import Plan, Section, validate

AnyConfig = TypeVar("AnyConfig", bound=Section)
_SHARED = {
    "base",
    "cnn",
    "dropout",
    "heads",
    "losses",
    "refiner",
    "sparse",
    "tokens",
    "unetr",
    "vit",
    "zoo",
}  # modules of this folder that are no method


def methods() -> list[str]:
    """Names of the methods there are."""
    return [m.name.replace("_", "-") for m in pkgutil.iter_modules(models.__path__) if m.name not in _SHARED]


def method_module(plan: Plan) -> ModuleType:
    """The module of a plan's method, which defines ``Config`` and ``build``."""
    if plan.method not in methods():
        raise PlanError(
            "no such method", where=plan.name, field="method", found=plan.method, remedy=nearest(plan.method, methods())
        )
    return importlib.import_module(f"medmae.models.{plan.method.replace('-', '_')}")


def config_of(plan: Plan, schema: type[AnyConfig]) -> AnyConfig:
    """The plan's ``model`` section, validated by the method's schema."""
    return validate(schema, plan.model, plan.name, prefix="model.")


def check_plan(plan: Plan) -> None:
    """Raise :class:`PlanError` unless the plan's method exists and accepts its ``model`` section."""
    config_of(plan, method_module(plan).Config)


def create(plan: str | Path | Mapping[str, Any] | Plan, overrides: Sequence[str] = ()) -> MaskedAutoencoder:
    """A model with random weights from a plan's name, path, dict or object.

    ``overrides`` are ``key=value`` strings as in ``medmae pretrain --set``. Raises :class:`PlanError` for a plan
    that is not valid. Seed torch before for reproducible weights.
    """
    resolved = Plan.load(plan, overrides)
    model: MaskedAutoencoder = method_module(resolved).build(resolved)
    return model
