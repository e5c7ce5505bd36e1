"""What is said of every image that a model made: side-cars, and where the model came from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import medmae
from medmae.files import file_hash
from medmae.imaging.registration import Coregistered
from medmae.synthesis.volumes import UNITS, Synthesis
from medmae.synthesis.windows import Synthesiser


def side_car(
    synthesis: Synthesis,
    provenance: Mapping[str, Any],
    hashes: Mapping[str, str],
    registered: Coregistered | None = None,
) -> dict[str, Any]:
    """What the JSON beside a synthesised image says; of images that were registered, how they were moved."""
    grid = synthesis.volume.grid
    registrations = registered.to_json()["registrations"] if registered else {}
    sources = {
        m: {"sha256": hashes[m], **({"registration": registrations[m]} if m in registrations else {})}
        for m in synthesis.sources
    }
    return {
        "synthetic": True,
        "warning": "Not acquired: predicted from other images by a model. Not for diagnosis.",
        "target": synthesis.target,
        "sources": sources,
        "checkpoint": provenance["checkpoint"],
        "version": provenance["version"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "intensity": {
            "scale": synthesis.units,
            "meaning": UNITS[synthesis.units],
            "mean": synthesis.mean,
            "std": synthesis.std,
            "background": 0,
        },
        "geometry": {
            "grid_of": synthesis.like,
            "coregistered": registered is not None,
            "shape": list(grid.shape),
            "spacing_mm": [round(float(s), 6) for s in grid.spacing],
            "orientation": grid.orientation,
            "affine": [[float(v) for v in row] for row in grid.affine],
        },
        "inference": {
            "model_shape": list(synthesis.array.shape),
            "model_spacing_mm": [float(s) for s in synthesis.study.grid.spacing],
            "window": list(synthesis.window),
            "windows": synthesis.windows,
            "patch_grid_shifts": [list(shift) for shift in synthesis.shifts],
            "refined": synthesis.refined,
        },
    }


def provenance_of(model: Synthesiser, checkpoint: str | Path | Synthesiser) -> dict[str, Any]:
    """Version and checkpoint (hash of the weights, plan, method) as side-cars and reports tell them."""
    known = model.metadata.get("weights_sha256")
    if known is None and isinstance(checkpoint, str | Path) and Path(checkpoint).is_file():
        known = file_hash(Path(checkpoint))
    plan = model.plan
    told = {"hash": known, "plan": plan.name, "plan_hash": plan.hash(), "method": plan.method}
    if "refiner" in model.metadata:
        told["refiner_hash"] = model.metadata["refiner"]["sha256"]
    return {"version": f"medmae {medmae.__version__}", "checkpoint": told}


def mark(kind: str, target: str | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON beside a map (``kind``: uncertainty, anomaly) begins with."""
    return {
        "synthetic": True,
        "kind": kind,
        **({"target": target} if target else {}),
        "warning": "Computed by a model, not acquired. Not for diagnosis.",
        "checkpoint": provenance["checkpoint"],
        "version": provenance["version"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
