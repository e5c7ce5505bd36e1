"""A file in the published Hi-End-MAE format gives the numbers of a plain timm build of the same network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medmae.errors import CheckpointError
from medmae.weights.importing import import_weights, load
from tests.plain_hi_end_mae import PlainHiEndMAE


@pytest.fixture(scope="module")
def plain() -> PlainHiEndMAE:
    torch.manual_seed(7)
    model = PlainHiEndMAE()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))  # biases and norms off their defaults
    return model.eval()


def write(model: PlainHiEndMAE, file: Path) -> Path:
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    return file


@pytest.fixture(scope="module")
def published(plain: PlainHiEndMAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(plain, tmp_path_factory.mktemp("published") / "hi_end_mae_10k.pth")


def test_published_file_gives_published_numbers(plain: PlainHiEndMAE, published: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = load(published)
    image = torch.rand(2, 1, 96, 96, 96)
    hidden = torch.ones(216, dtype=torch.bool)
    hidden[torch.randperm(216)[:54]] = False
    mask = {"ct": hidden.view(1, 6, 6, 6).expand(2, -1, -1, -1)}
    with torch.no_grad():
        latent, outputs = plain.encode(image, hidden)
        predicted = plain.decode(latent, outputs, hidden)
        out = model(image, mask=mask, return_prediction=True)
        torch.testing.assert_close(model.encode(image, mask=mask), latent, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(image, mask=mask).loss, plain(image, hidden), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.loss, plain(image, hidden), rtol=1e-5, atol=1e-5)
        rows = image.view(2, 6, 16, 6, 16, 6, 16).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 216, 4096)
        shown = out.prediction["ct"].view(2, 6, 16, 6, 16, 6, 16).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 216, 4096)
        deviation = (rows.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        in_images_units = predicted * deviation + rows.mean(-1, keepdim=True)
        torch.testing.assert_close(shown, in_images_units, rtol=1e-5, atol=1e-5)

    report = import_weights(published, tmp_path / "model")
    assert report.family == "Hi-End-MAE" and report.plan == "hi-end-mae-base"
    assert report.new == [] and report.ignored == []
    again = load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_truncated_file_is_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(published.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="truncated"):
        load(tmp_path / "cut.pth")


def test_other_widths_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    file = write(PlainHiEndMAE(width=384, depth=10, heads=6, decoder_width=192), tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match="another architecture") as refused:
        load(file)
    assert "384" in str(refused.value) and "width 768" in str(refused.value)
    file = write(PlainHiEndMAE(depth=10, decoder_width=192), tmp_path / "shallow.pth")
    with pytest.raises(CheckpointError) as refused:
        load(file)
    assert "blocks.11" in str(refused.value) or "decoder" in str(refused.value)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"module.encoder_to_decoder.0.weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
