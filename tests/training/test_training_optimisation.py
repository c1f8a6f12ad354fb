"""Losses against their formulas; the optimiser's momentum, groups and schedule; frozen statistics."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from multisa.training import loop
from multisa.training.affinity_net import affinity_loss
from multisa.training.augment import AugmentedImages
from multisa.training.backbones import Backbone
from multisa.training.config import Schedule, TrainConfig
from multisa.training.data import read_dataset
from multisa.training.frozen_norm import folded_norms
from multisa.training.loop import BatchLoss, LoopOptions, MovingAverage, train_network
from multisa.training.multi_sa import multilabel_soft_margin
from multisa.training.segmenter import segmentation_loss, soft_segmentation_loss


def whole(loss: Callable[[], torch.Tensor]) -> BatchLoss:
    """A loss that is not divided."""
    return BatchLoss(torch.ones(()), lambda _: loss())


def test_soft_margin_is_equation_10() -> None:
    activations = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    x = activations.mean((-2, -1)).double().numpy()
    y = labels.numpy()
    terms = y * np.log(1 / (1 + np.exp(-x))) + (1 - y) * np.log(np.exp(-x) / (1 + np.exp(-x)))
    assert multilabel_soft_margin(activations, labels).item() == pytest.approx(-terms.mean(), rel=1e-5)


def test_affinity_loss_weighs_the_three_kinds_of_pairs() -> None:
    affinity = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.5]).view(1, 5, 1, 1)
    same = torch.tensor([1, 1, 1, 0, -1], dtype=torch.int8).view(1, 5, 1, 1)
    background = torch.tensor([True, False, False, True, True]).view(1, 5, 1, 1)
    expected = -np.log(0.9) / 4 - (np.log(0.8) + np.log(0.3)) / 2 / 4 - np.log(0.4) / 2
    assert affinity_loss(affinity, same, background).item() == pytest.approx(expected, rel=1e-3)
    nothing = torch.full_like(same, -1)
    assert affinity_loss(affinity, nothing, background).item() == 0.0


def test_segmentation_loss_leaves_out_255() -> None:
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[[0, 255], [2, 255]]], dtype=torch.uint8)
    logs = logits.log_softmax(1)[0]
    expected = -(logs[0, 0, 0] + logs[2, 1, 0]) / 2
    torch.testing.assert_close(segmentation_loss(logits, mask), expected)


def test_soft_loss_of_certain_targets_is_the_hard_loss() -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 4, 5, generator=random)
    mask = torch.randint(0, 3, (2, 4, 5), generator=random)
    targets = nn.functional.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    mask[0, :2], targets[0, :, :2] = 255, 0.0
    hard = segmentation_loss(logits, mask.to(torch.uint8))
    torch.testing.assert_close(soft_segmentation_loss(logits, targets), hard)
    # A cell that the image covers by a quarter counts a quarter.
    weights = torch.ones(2, 1, 4, 5)
    weights[1] = 0.25
    each = -(targets * logits.log_softmax(1)).sum(1, keepdim=True)
    counted = (weights * targets.sum(1, keepdim=True)).sum()
    torch.testing.assert_close(soft_segmentation_loss(logits, weights * targets), (weights * each).sum() / counted)
    assert soft_segmentation_loss(logits, torch.zeros_like(targets)).item() == 0.0


def test_moving_average_follows_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = MovingAverage(model, 0.5)
    nn.init.ones_(model.weight)
    expected = 0.0
    for updates in range(1, 20):
        average.update(model)
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay)
    assert average.state["weight"].item() == pytest.approx(expected)
    nn.init.zeros_(model.weight)
    average.copy_to(model)
    assert model.weight.item() == pytest.approx(expected)


def randomise_norms(network: nn.Module) -> None:
    random = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.weight.data.uniform_(0.5, 1.5, generator=random)
            module.bias.data.normal_(0, 0.2, generator=random)
            module.running_mean.normal_(0, 0.2, generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)


def outputs_and_gradients(network: Backbone, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    levels = network(image)
    loss = torch.stack([level.square().mean() for level in levels]).sum()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return levels, list(torch.autograd.grad(loss, parameters, allow_unused=True))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "densenet121"])
def test_folding_frozen_norms_changes_nothing_but_the_time(name: str) -> None:
    network = Backbone(name, weights="none").double().eval()
    randomise_norms(network)
    image = torch.rand(2, 3, 72, 88, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, gradients = outputs_and_gradients(network, image)
    keys = list(network.state_dict())
    with folded_norms(network.network):
        assert any("forward" in vars(module) for module in network.modules())
        got, folded = outputs_and_gradients(network, image)
        assert list(network.state_dict()) == keys
    assert not any("forward" in vars(module) for module in network.modules())
    for first, second in zip((*expected, *gradients), (*got, *folded), strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            scale = float(first.detach().abs().max()) + 1e-12
            torch.testing.assert_close(second / scale, first / scale, rtol=1e-6, atol=1e-6)


class SharedConvolution(nn.Module):
    """A convolution whose output the norm and another layer read: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        made = self.convolution(image)
        return [made, self.norm(made)]


@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_convolution_that_others_read_is_not_folded(is_fresh: bool) -> None:
    network = SharedConvolution().eval()
    if not is_fresh:
        randomise_norms(network)
    with folded_norms(network):
        assert not any("forward" in vars(module) for module in network.modules())


def test_what_is_folded_does_not_depend_on_the_weights() -> None:
    network = Backbone("test_resnet", weights="none").network
    folded = []
    for scale in (1.0, 0.0, 1e6):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(scale)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        random = torch.get_rng_state()
        with folded_norms(network):
            folded.append([name for name, module in network.named_modules() if "forward" in vars(module)])
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert folded[0] and folded[0] == folded[1] == folded[2]


def test_values_return_when_the_probe_fails() -> None:
    class Failing(SharedConvolution):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            raise KeyboardInterrupt

    network = Failing()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), folded_norms(network):
        pass
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_frozen_levels_do_not_learn() -> None:
    network = Backbone("test_efficientnet", weights="none")
    network.freeze(2)
    levels = network.eval()(torch.rand(1, 3, 64, 64))
    assert not levels[0].requires_grad and not levels[1].requires_grad and levels[2].requires_grad
    learning = [parameter.requires_grad for parameter in network.parameters()]
    assert any(learning) and not all(learning)


def test_momentum_groups_and_poly_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    made: list[Watched] = []

    def make(*arguments: object, **options: object) -> Watched:
        made.append(Watched(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(loop.torch.optim, "SGD", make)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    data = torch.utils.data.TensorDataset(torch.randn(8, 2))
    schedule = Schedule(epochs=2, batch_size=4, learning_rate=0.1, new_layers_factor=5.0, momentum=0.9)
    train_network(
        model,
        [(schedule.new_layers_factor, model[1].parameters())],
        data,
        lambda batch: whole(lambda: model(batch[0]).square().mean()),
        schedule,
        LoopOptions(tmp_path / "checkpoint", 0, 0, "groups"),
    )
    assert [group["momentum"] for group in made[0].param_groups] == [0.9, 0.9]
    expected = [(1 - step / 4) ** 0.9 for step in range(4)]
    np.testing.assert_allclose(rates, [[0.1 * rate, 0.5 * rate] for rate in expected])


def test_worker_processes_give_the_same_batches_and_are_not_forked(voc_folder: Path, tmp_path: Path) -> None:
    context = loop._worker_context()
    assert context.get_start_method() in ("forkserver", "spawn")
    schedule = Schedule(batch_size=3, crop=64, resize=(64, 96))
    samples = AugmentedImages(read_dataset(voc_folder).train_images, schedule, TrainConfig(), n_classes=3)
    assert pickle.loads(pickle.dumps(samples)).items == samples.items
    batches = {
        workers: list(loop._batches(samples, schedule, LoopOptions(tmp_path / "c", 3, workers, "batches"), epoch=1))
        for workers in (0, 2)
    }
    assert len(batches[0]) == len(batches[2]) == 2
    for alone, loaded in zip(batches[0], batches[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, loaded, strict=True))


def test_frozen_statistics_stay_while_the_affine_part_learns(tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone("test_efficientnet", weights="none")

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.backbone(image)[-1])

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 64, 64))
    changed = {}
    for frozen in (True, False):
        torch.manual_seed(0)
        model = Network()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        train_network(
            model,
            [],
            data,
            lambda batch, model=model: whole(lambda: model(batch[0]).square().mean()),
            Schedule(epochs=1, batch_size=4, freeze_batch_norm=frozen),
            LoopOptions(tmp_path / f"frozen-{frozen}", 0, 0, "frozen"),
        )
        after = model.state_dict()
        changed[frozen] = {key for key in before if not torch.equal(before[key], after[key])}
    model = Network()
    model.backbone.requires_grad_(False)
    model.extra = nn.BatchNorm2d(3)
    model.train()
    loop._set_training_mode(model, Schedule(freeze_batch_norm=False))
    assert not any(module.training for module in model.backbone.modules()) and model.extra.training
    assert not any("running" in key for key in changed[True])
    assert any("running" in key for key in changed[False])
    assert any("bn" in key and key.endswith("weight") for key in changed[True])
