"""Augmentation: the same geometry for all modalities, checked against SciPy's resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medmae.plan import Augmentation
from medmae.training.augment import augment

STILL = {"flip": (0, 0, 0), "scale": 0.0, "shift": 0.0}


def blob(shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """(1, 1, D, H, W), smooth and far from the border, so that interpolation and padding hardly matter."""
    inside = np.zeros(shape)
    inside[tuple(slice(s // 4, -(s // 4)) for s in shape)] = np.random.default_rng(seed).standard_normal(
        [s - 2 * (s // 4) for s in shape]
    )
    return torch.from_numpy(ndimage.gaussian_filter(inside, 1.5).astype(np.float32))[None, None]


def rngs(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


@pytest.mark.parametrize("shape", [(24, 24, 24), (20, 28, 24)])
def test_rotation_and_zoom_agree_with_scipy(shape: tuple[int, int, int]) -> None:
    augmentation = Augmentation(**STILL, rotation=20, rotation_chance=1, zoom=(0.8, 1.25), zoom_chance=1)
    image = blob(shape)
    bent = augment({"t1": image}, augmentation, rngs(3))["t1"][0, 0].numpy()
    rng = np.random.default_rng(3)
    rng.random(2)
    angles, factor = rng.uniform(-20, 20, 3), rng.uniform(0.8, 1.25)
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() / factor
    middle = (np.array(shape) - 1) / 2
    expected = ndimage.affine_transform(image[0, 0].numpy(), matrix, middle - matrix @ middle, order=1, mode="nearest")
    assert np.abs(bent - expected).max() < 1e-4
    assert np.abs(bent - image[0, 0].numpy()).max() > 0.02


def test_zoom_of_two_doubles_distances() -> None:
    image = torch.zeros(1, 1, 33, 33, 33)
    image[..., 16, 16, 20] = 1.0  # four voxels from the middle
    augmentation = Augmentation(**STILL, zoom=(2.0, 2.0), zoom_chance=1)
    zoomed = augment({"t1": image}, augmentation, rngs(0))["t1"]
    assert np.unravel_index(int(zoomed.argmax()), (33, 33, 33)) == (16, 16, 24)


def test_quarter_turns_only_in_square_planes_and_for_all_modalities_alike() -> None:
    augmentation = Augmentation(**STILL, rotate90_chance=1)
    image = blob((16, 24, 16))
    turned = augment({"t1": image, "t2": 2 * image}, augmentation, rngs(1))
    options = [torch.rot90(image, k, (2, 4)) for k in (1, 2, 3)]
    assert any(torch.equal(turned["t1"], option) for option in options)
    assert torch.equal(turned["t2"], 2 * turned["t1"])
    assert augment({"t1": blob((12, 16, 24))}, augmentation, rngs(1))["t1"].shape == (1, 1, 12, 16, 24)


def test_a_sample_depends_on_its_own_generator_alone() -> None:
    augmentation = Augmentation(rotation=30, rotation_chance=0.5, zoom=(0.7, 1.4), zoom_chance=0.5, rotate90_chance=0.3)
    images = torch.cat([blob((16, 16, 16), seed) for seed in range(6)])
    together = augment({"t1": images}, augmentation, rngs(*range(6)))["t1"]
    for i in range(6):
        alone = augment({"t1": images[i : i + 1]}, augmentation, rngs(i))["t1"]
        torch.testing.assert_close(alone[0], together[i])
