"""ResEnc-UNet MAE: nnU-Net's residual-encoder U-Net fills in hidden cubes (arXiv 2410.23132).

The network is ``ResidualEncoderUNet`` itself, so encoder **and** decoder move to nnU-Net. Hidden voxels are set to 0,
the U-Net's skips stay, and the loss is the mean squared error over hidden voxels.
"""

from __future__ import annotations

from torch import Tensor

from medmae.models.cnn import CnnConfig, ConvolutionalMAE
from medmae.plan import Plan


class Config(CnnConfig):
    """See :class:`medmae.models.cnn.CnnConfig`."""


class ResEncMAE(ConvolutionalMAE):
    """See the module's docstring; the interface is :class:`MaskedAutoencoder`'s."""

    def features(self, x: Tensor, hidden: Tensor) -> list[Tensor]:
        """The encoder's outputs, shallow to deep."""
        found: list[Tensor] = self.network.encoder(self.visible_part(x, hidden))  # type: ignore[operator]
        return found

    def predict(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The network on what is visible."""
        predicted: Tensor = self.network(self.visible_part(x, hidden))
        return predicted


def build(plan: Plan) -> ResEncMAE:
    """The model of a plan, with random weights."""
    from medmae.models.zoo import config_of

    return ResEncMAE(plan, config_of(plan, Config))
