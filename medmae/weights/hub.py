"""Models on the Hugging Face Hub: what :class:`medmae.models.base.MaskedAutoencoder` does behind ``save_pretrained``,
``from_pretrained`` and ``push_to_hub`` (huggingface_hub's mixin).

A folder, local or on the Hub, holds ``model.safetensors`` and ``metadata.json`` as a checkpoint does, the plan as
``config.json``, and a model card written from the metadata. :func:`medmae.load` reads it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import medmae
from medmae.errors import CheckpointError
from medmae.files import write_text
from medmae.models.base import MaskedAutoencoder, without_repeats
from medmae.plan import Plan
from medmae.training.checkpoint import METADATA, WEIGHTS, facts_of, read_checkpoint, write_weights

CONFIG = "config.json"
_PAPERS = {
    "bm-mae": ("BM-MAE", "2505.00568"),
    "hi-end-mae": ("Hi-End-MAE", "2502.08347"),
    "resenc-mae": ("Revisiting MAE pre-training for 3D medical image segmentation", "2410.23132"),
    "spark": ("SparK", "2301.03580"),
}


def save(model: MaskedAutoencoder, folder: Path) -> None:
    """Write weights, metadata and plan of ``model`` to ``folder``."""
    write_weights(folder, without_repeats(model, model.state_dict()), described(model))
    write_text(folder / CONFIG, json.dumps({"plan": model.plan.model_dump(mode="json")}, indent=2))


def from_pretrained(name: str | Path, **options: Any) -> MaskedAutoencoder:
    """A model from a folder of ``save_pretrained``, or from the Hugging Face Hub (``owner/name``).

    ``options``: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only`` of huggingface_hub.
    Raises :class:`CheckpointError` when it cannot be had or is not one of ours.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, METADATA, CONFIG], **options))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                "no folder of this name, and the Hub did not give a model",
                where=name,
                found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                expected="a folder, or owner/name of a repository on the Hub",
            ) from None
    return read_checkpoint(folder)[0]


def described(model: MaskedAutoencoder) -> dict[str, Any]:
    """The model's metadata; of a model that was never trained, what its plan tells."""
    plan = model.plan
    own = {
        **facts_of(plan),
        "versions": {"medmae": medmae.__version__},
        "licence_note": "Weights carry the terms of the data they were trained on.",
    }
    return {**own, **{k: v for k, v in model.metadata.items() if k != "weights_sha256"}}


def card(model: MaskedAutoencoder, licence: str | None = None) -> ModelCard:
    """The model card, from the metadata alone. ``licence``: an identifier of the Hub; left out, ``other`` with the
    metadata's note."""
    facts = described(model)
    data = ModelCardData(
        library_name="medmae",
        license=licence or "other",
        license_name=None if licence else "terms-of-the-training-data",
        pipeline_tag="image-feature-extraction",
        tags=["medical-imaging", "masked-autoencoder", "3d", facts["method"], *facts["modalities"]],
    )
    name, paper = _PAPERS.get(facts["method"], (facts["method"], None))
    image = facts["image"]
    rows = {
        "Method": f"{name} ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else name,
        "Modalities": ", ".join(facts["modalities"]),
        "Spacing": " × ".join(f"{v:g}" for v in image["spacing"]) + " mm",
        "Orientation": image["orientation"],
        "Crop": " × ".join(map(str, image["crop"])) + " voxels",
        "Intensity": intensity(Plan.load(facts["plan"])),
        "Data": data_of(facts),
        "Trained": f"{facts['step']} steps"
        if "step" in facts
        else "see above"
        if "imported" in facts
        else "not at all",
        "Versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
        "Licence": licence or facts["licence_note"],
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    scales = scales_of(facts)
    text = f"""---
{data.to_yaml()}
---

# {Plan.load(facts["plan"]).name}

A masked autoencoder for 3D medical images, made with medmae.

| | |
|---|---|
{table}

{scales}## Use

```python
import medmae

model = medmae.from_pretrained("OWNER/NAME")
```

Images are brought to the spacing, orientation and intensities above by `medmae prepare` and `medmae reconstruct`.

## Limits

A synthesised image is a prediction, not a measurement. Not for diagnosis. What the model has learned is what its
training data showed; on other scanners, sequences or diseases it may be wrong.
"""
    return ModelCard(text)


def intensity(plan: Plan) -> str:
    """The plan's normalisation in words."""
    scheme = plan.image.intensity
    words = {
        "zscore-nonzero": "z-score over the voxels that are not 0",
        "zscore": "z-score over all voxels",
        "window": f"{scheme.low} to {scheme.high} becomes 0 to 1",
        "none": "as stored",
    }[scheme.scheme]
    return words if scheme.clip is None else f"{words}, cut at ± {scheme.clip:g}"


def data_of(facts: dict[str, Any]) -> str:
    """Where the weights come from."""
    if "imported" in facts:
        return f"imported from a published {facts['imported']['family']} file"
    if "data" not in facts:
        return "none"
    data = facts["data"]
    return (
        f"{data['training_studies']} studies to train on, {data['validation_studies']} to validate "
        f"(fingerprint {data['fingerprint']})"
    )


def scales_of(facts: dict[str, Any]) -> str:
    """A table of what the training scans' intensities were, which give a synthesis its units."""
    known = facts.get("intensity") or {}
    if not known:
        return ""
    rows = "\n".join(f"| {name} | {v['mean']:.4g} | {v['std']:.4g} |" for name, v in known.items())
    return f"## Typical intensities of the training scans\n\n| modality | mean | deviation |\n|---|---|---|\n{rows}\n\n"
