"""A file in the published BM-MAE format gives the numbers of a plain MONAI build of the same network."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from medmae.errors import CheckpointError
from medmae.weights.importing import import_weights, load
from tests.plain_bm_mae import PlainBMMAE

NAMES = {"t1": "t1", "t1ce": "t1c", "t2": "t2", "flair": "flair"}


@pytest.fixture(scope="module")
def plain() -> PlainBMMAE:
    torch.manual_seed(7)
    model = PlainBMMAE()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))  # biases and norms off their defaults
    return model.eval()


@pytest.fixture(scope="module")
def published(plain: PlainBMMAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("published") / "bmmae.pth"
    torch.save(plain.state_dict(), file)
    return file


def test_published_file_gives_published_numbers(plain: PlainBMMAE, published: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = load(published)
    images = {name: torch.randn(1, 1, 128, 128, 128) for name in NAMES}
    ours = {NAMES[name]: image for name, image in images.items()}
    hidden = {name: torch.rand(512) < 0.75 for name in NAMES}
    mask = {NAMES[name]: h.view(1, 8, 8, 8) for name, h in hidden.items()}
    with torch.no_grad():
        latent = plain.encode(images, hidden)
        predicted = plain.decode(latent, images, hidden)
        loss = plain(images, hidden)
        out = model(ours, mask=mask, return_prediction=True)
        torch.testing.assert_close(model.encode(ours, mask=mask), latent, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-5)
        for name in NAMES:
            torch.testing.assert_close(
                out.prediction[NAMES[name]], plain.volume(predicted[name], 8), rtol=1e-5, atol=1e-5
            )
        present = {name: images[name] for name in ("t1", "t2")}
        none = {name: torch.zeros(512, dtype=torch.bool) for name in present}
        expected = plain.decode(plain.encode(present, none), present, none)["flair"]
        got = model.reconstruct({name: images[name] for name in ("t1", "t2")}, ["flair"])["flair"]
        torch.testing.assert_close(got, plain.volume(expected, 8), rtol=1e-5, atol=1e-5)

    report = import_weights(published, tmp_path / "model")
    assert report.new == [] and len(report.loaded) == len(model.state_dict())
    assert all("norm_cross_attn" in key for key in report.ignored)
    again = load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_other_positions_in_the_file_are_used(plain: PlainBMMAE, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    key = "tokenizers.t1.patch_embedding.position_embeddings"
    state[key] = torch.randn_like(state[key])
    torch.save(state, tmp_path / "learned.pth")
    model = load(tmp_path / "learned.pth")
    torch.testing.assert_close(model.tokenizers["t1"].positions((8, 8, 8)), state[key])
    assert model.tokenizers["t1"].positions((4, 6, 8)).shape == (1, 4 * 6 * 8, 768)


def test_truncated_file_is_refused(published: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(published.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="truncated"):
        load(cut)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"cls_token": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pkl"):
        with pytest.raises(CheckpointError, match="could run code"):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_other_widths_are_refused_with_the_list(tmp_path: Path) -> None:
    small = PlainBMMAE(width=384, depth=2, mlp=768, decoder_depth=1)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match="another architecture") as refused:
        load(tmp_path / "small.pth")
    assert "768" in str(refused.value) and "missing" in str(refused.value)


def test_incomplete_file_only_when_asked(plain: PlainBMMAE, tmp_path: Path) -> None:
    state = {k: v for k, v in plain.state_dict().items() if not k.startswith("decoder.")}
    torch.save(state, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "encoder.pth")
    report = import_weights(tmp_path / "encoder.pth", tmp_path / "model", allow_partial=True)
    assert report.new and all(name.startswith("decoder.") for name in report.new)


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"layer\.weight"):
        load(tmp_path / "other.pth")
