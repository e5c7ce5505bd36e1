"""medmae: masked-autoencoder pre-training on 3D medical images.

The public functions are the commands of the same names::

    import medmae

    model = medmae.create("bm-mae-base")         # a plan's name, path or object; random weights
    model = medmae.load("RUN")                   # a run, a checkpoint folder or a published file
    medmae.pretrain("SCANS", "bm-mae-tiny", "RUN", max_steps=100)

Everything here is imported when it is first used, so ``import medmae`` costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medmae.benchmark import benchmark as benchmark
    from medmae.cohort.demo import make_demo_cohort as make_demo_cohort
    from medmae.cohort.integrity import inspect as inspect
    from medmae.cohort.layouts import find_studies as find_studies
    from medmae.cohort.store import Cohort as Cohort
    from medmae.cohort.store import prepare as prepare
    from medmae.cohort.study import Study as Study
    from medmae.demo import demo as demo
    from medmae.errors import CheckpointError as CheckpointError
    from medmae.errors import InputError as InputError
    from medmae.errors import MedmaeError as MedmaeError
    from medmae.errors import PlanError as PlanError
    from medmae.errors import Problem as Problem
    from medmae.errors import TrainingError as TrainingError
    from medmae.finetune import HeadSettings as HeadSettings
    from medmae.finetune import finetune_classify as finetune_classify
    from medmae.finetune import finetune_survive as finetune_survive
    from medmae.imaging.nifti import write_nifti as write_nifti
    from medmae.imaging.registration import coregister as coregister
    from medmae.imaging.source import read_image as read_image
    from medmae.imaging.volume import Grid as Grid
    from medmae.imaging.volume import Volume as Volume
    from medmae.models.zoo import create as create
    from medmae.nnunet.dataset import make_dataset as make_dataset
    from medmae.nnunet.segment import finetune_segment as finetune_segment
    from medmae.nnunet.segment import predict_segment as predict_segment
    from medmae.nnunet.segment import write_plans as write_plans
    from medmae.plan import Plan as Plan
    from medmae.plan import available_plans as available_plans
    from medmae.predictions import predict_features as predict_features
    from medmae.predictions import predict_outcome as predict_outcome
    from medmae.probes import evaluate_features as evaluate_features
    from medmae.synthesis.evaluate import evaluate_synthesis as evaluate_synthesis
    from medmae.synthesis.reconstruct import reconstruct as reconstruct
    from medmae.synthesis.reconstruct import reconstruct_volumes as reconstruct_volumes
    from medmae.synthesis.refining import finetune_synthesis as finetune_synthesis
    from medmae.training.pretrain import pretrain as pretrain
    from medmae.weights.exporting import export as export
    from medmae.weights.hub import from_pretrained as from_pretrained
    from medmae.weights.importing import import_weights as import_weights
    from medmae.weights.importing import load as load

_HOME = {
    "CheckpointError": "medmae.errors",
    "Cohort": "medmae.cohort.store",
    "Grid": "medmae.imaging.volume",
    "HeadSettings": "medmae.finetune",
    "InputError": "medmae.errors",
    "MedmaeError": "medmae.errors",
    "Plan": "medmae.plan",
    "PlanError": "medmae.errors",
    "Problem": "medmae.errors",
    "Study": "medmae.cohort.study",
    "TrainingError": "medmae.errors",
    "Volume": "medmae.imaging.volume",
    "available_plans": "medmae.plan",
    "benchmark": "medmae.benchmark",
    "coregister": "medmae.imaging.registration",
    "create": "medmae.models.zoo",
    "demo": "medmae.demo",
    "evaluate_features": "medmae.probes",
    "evaluate_synthesis": "medmae.synthesis.evaluate",
    "export": "medmae.weights.exporting",
    "finetune_classify": "medmae.finetune",
    "finetune_survive": "medmae.finetune",
    "finetune_segment": "medmae.nnunet.segment",
    "finetune_synthesis": "medmae.synthesis.refining",
    "find_studies": "medmae.cohort.layouts",
    "from_pretrained": "medmae.weights.hub",
    "import_weights": "medmae.weights.importing",
    "inspect": "medmae.cohort.integrity",
    "load": "medmae.weights.importing",
    "make_demo_cohort": "medmae.cohort.demo",
    "make_dataset": "medmae.nnunet.dataset",
    "predict_features": "medmae.predictions",
    "predict_outcome": "medmae.predictions",
    "predict_segment": "medmae.nnunet.segment",
    "prepare": "medmae.cohort.store",
    "pretrain": "medmae.training.pretrain",
    "read_image": "medmae.imaging.source",
    "reconstruct": "medmae.synthesis.reconstruct",
    "reconstruct_volumes": "medmae.synthesis.reconstruct",
    "write_plans": "medmae.nnunet.segment",
    "write_nifti": "medmae.imaging.nifti",
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medmae' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps ``medmae.demo`` the function when the module of that name is imported, which Python would put there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
