"""Augmentations by configuration: parsed without evaluating anything, the same for a seed, and nothing else changes."""

import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.records import record_from_dict, record_to_dict
from multisa.training import stages, transforms
from multisa.training.augment import AugmentedImages
from multisa.training.config import CamConfig, Schedule, TrainConfig, load_config
from multisa.training.data import read_dataset
from multisa.training.pipeline import check_networks
from multisa.training.transforms import apply_transforms, parse_transform
from multisa.training.weights import import_timm

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
MASK = np.random.default_rng(1).integers(0, 3, (40, 40)).astype(np.uint8)


def why_no_torchvision() -> str:
    try:
        import_timm()
        importlib.import_module("torchvision.transforms.v2")
    except ImportError as error:
        return str(error)
    return ""


WHY = why_no_torchvision()
with_torchvision = pytest.mark.skipif(bool(WHY), reason=f"torchvision.transforms.v2 cannot be imported here: {WHY}")


@pytest.mark.parametrize(
    ("entry", "parsed"),
    [
        ("ColorJitter(brightness=0.3, hue=(-0.1, 0.1))", ("ColorJitter", [], {"brightness": 0.3, "hue": (-0.1, 0.1)})),
        (" GaussianBlur(3, sigma=[0.1, 2]) ", ("GaussianBlur", [3], {"sigma": [0.1, 2]})),
        ("my.module:function", ("my.module:function", [], {})),
    ],
)
def test_entries_are_parsed(entry: str, parsed: object) -> None:
    assert parse_transform(entry) == parsed


@pytest.mark.parametrize(
    "entry",
    [
        "ColorJitter", "__import__('os').system('true')", "Pad(__import__('os'))", "v2.Pad(1)", "Pad(1); Pad(2)",
        "Compose([Pad(1)])", "Pad(**{'a': open('x')})", "Pad(lambda: 1)", "os:system()",
        "a:b:c", "(" * 5000, ":", "x:", "Pad(*1)",
    ],
)  # fmt: skip
def test_nothing_else_is_parsed(entry: str) -> None:
    with pytest.raises(ValueError, match=r'expected "Name\(key=value, ..\)" with plain values, or "module:function"'):
        parse_transform(entry)
    with pytest.raises(UsageError, match=r"cam.schedule.augment: got"):
        load_config(
            "lite0", [f"cam.schedule.augment={[entry]!r}" if "'" not in entry else f'cam.schedule.augment=["{entry}"]']
        )


def test_settings_are_a_list_or_one_string() -> None:
    assert Schedule().augment == Schedule(augment="").augment == Schedule(augment=("",)).augment == ()
    one = load_config("lite0", ["cam.schedule.augment=my:function"]).cam.schedule
    assert one.augment == ("my:function",)
    two = load_config("lite0", ['segmenter.schedule.augment=["RandomGrayscale(p=0.1)", "my:function"]'])
    assert two.segmenter.schedule.augment == ("RandomGrayscale(p=0.1)", "my:function")
    assert record_from_dict(TrainConfig, record_to_dict(two)) == two
    with pytest.raises(UsageError, match=r"augment: got int 3"):
        load_config("lite0", ["cam.schedule.augment=3"])


def test_stages_without_augmentations_keep_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cam = CamConfig()
    values = record_to_dict(cam)
    assert values["schedule"].pop("augment") == []
    assert stages._identity(cam) == values
    module = tmp_path / "my_augmentations.py"
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for code in ("def same(image, target): return image, target", "def same(i, t): return i, t"):
        module.write_text(code)
        own = replace(cam, schedule=replace(cam.schedule, augment=("my_augmentations:same", "Pad(1)")))
        first, second = stages._identity(own)["schedule"]["augment"]
        assert first.startswith("my_augmentations:same ") and second == "Pad(1)"
        digests.append(first)
    assert digests[0] != digests[1]  # its code decides as well


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_functions.py").write_text(
        "import random\nimport numpy as np\nimport torch\nno_function = 3\n"
        "def mirror(image, target):\n"
        "    return image[:, ::-1], None if target is None else target[..., ::-1]\n"
        "def noise(image, target):\n"
        "    add = np.random.randint(9) + random.randint(0, 9) + int(torch.randint(9, ()))\n"
        "    return image + np.uint8(add), target\n"
        "def small(image, target):\n    return image[:9], target\n"
        "def wrong(image, target):\n    return image.astype(np.float32), target\n"
        "def one(image, target):\n    return image\n"
        "def breaks(image, target):\n    raise ValueError('mine')\n"
    )
    image, mask = apply_transforms(("own_functions:mirror",), IMAGE, MASK, seed=0)
    assert (image == IMAGE[:, ::-1]).all() and mask is not None and (mask == MASK[:, ::-1]).all()
    assert apply_transforms(("own_functions:mirror",), IMAGE, None, seed=0)[1] is None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    noisy = [apply_transforms(("own_functions:noise",), IMAGE, MASK, seed)[0] for seed in (1, 1, 2, 3)]
    assert (noisy[0] == noisy[1]).all() and any((noisy[0] != other).any() for other in noisy[2:])
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for name, message in (
        ("small", r"got uint8 \[9, 40, 3\] back, expected uint8 \[40, 40, 3\]"),
        ("wrong", r"got float32 \[40, 40, 3\] back, expected uint8"),
        ("one", "got ValueError"),
        ("breaks", "got ValueError.'mine'."),
        ("no_function", "got no function no_function in own_functions"),
        ("missing", "got no function missing in own_functions"),
    ):
        with pytest.raises(UsageError, match=rf"augment 'own_functions:{name}': {message}"):
            apply_transforms((f"own_functions:{name}",), IMAGE, MASK, seed=0)
    with pytest.raises(UsageError, match=r"got no module nowhere.at_all, expected one on the path: set PYTHONPATH"):
        apply_transforms(("nowhere.at_all:function",), IMAGE, MASK, seed=0)


@with_torchvision
def test_transforms_of_torchvision() -> None:
    entries = ("ColorJitter(brightness=0.5, hue=0.1)", "RandomGrayscale(p=0.1)")
    same = [apply_transforms(entries, IMAGE, MASK, seed) for seed in (1, 1, 2)]
    assert (same[0][0] == same[1][0]).all() and (same[0][0] != same[2][0]).any()
    assert all((mask == MASK).all() for _, mask in same) and (same[0][0] != IMAGE).any()
    image, mask = apply_transforms(("RandomHorizontalFlip(p=1)", "RandomVerticalFlip(p=1.0)"), IMAGE, MASK, seed=0)
    assert (image == IMAGE[::-1, ::-1]).all() and mask is not None and (mask == MASK[::-1, ::-1]).all()
    assert apply_transforms(("RandomInvert(p=1)",), IMAGE, None, seed=0)[1] is None


@with_torchvision
def test_where_an_image_is_moved_away_the_target_is_unknown() -> None:
    shift = ("RandomAffine(0, translate=(0.5, 0.5))",)
    image, mask = apply_transforms(shift, IMAGE, MASK, seed=1)
    assert mask is not None
    outside = mask == 255
    assert 0 < outside.sum() < MASK.size and (image[outside] == transforms.PADDING).all()
    soft = np.stack([MASK == 0, MASK != 0]).astype(np.float32)
    _, moved = apply_transforms(shift, IMAGE, soft, seed=1)
    assert moved is not None and moved.dtype == np.float32
    assert (moved.sum(0) == 1 - outside).all() and (moved[0] == (mask == 0)).all()


@with_torchvision
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Nothing(1)", "got Nothing, expected a transform of torchvision.transforms.v2"),
        ("InterpolationMode(1)", "got InterpolationMode, expected a transform"),
        ("RandomGrayscale(q=1)", "got TypeError"),
        ("ColorJitter(brightness=-3)", "got ValueError"),
        ("Resize(20)", r"got uint8 \[20, 20, 3\] back, expected uint8 \[40, 40, 3\]"),
        ("RandomAdjustSharpness()", "got TypeError"),
    ],
)
def test_transforms_that_cannot_be_used(entry: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_transforms((entry,), IMAGE, MASK, seed=0)
    with pytest.raises(UsageError, match="augment"):  # before the first stage
        check_networks(load_config("lite0", [f'affinity.schedule.augment=["{entry}"]']), 3)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    transforms._transform.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(BackendUnavailable, match=r"needs torchvision .* pip install \"\.\[train\]\""):
        apply_transforms(("RandomGrayscale(p=0.1)",), IMAGE, MASK, seed=0)


@with_torchvision
def test_samples(voc_folder: Path, tmp_path: Path) -> None:
    items = read_dataset(voc_folder, quiet=True).train_images
    flips = ("RandomHorizontalFlip(p=1)", "RandomPhotometricDistort(p=0)")
    for index, item in enumerate(items):
        maps = np.random.default_rng(index).random((1 + len(item.classes), 20, 30)).astype(np.float32)
        np.save(tmp_path / f"{item.id}.npy", maps)
    for target in ({}, {"truth": True}, {"probabilities": tmp_path, "stride": 4}):
        plain, mirrored = (
            AugmentedImages(
                items, Schedule(crop=64, resize=(48, 96), augment=augment), TrainConfig(), n_classes=3, **target
            )
            for augment in ((), flips)
        )
        for index in range(4):
            (image, label), (other, changed) = plain[index], mirrored[index]
            assert torch.equal(other, image.flip(1))
            assert torch.allclose(changed.float(), (label.flip(-1) if target else label).float())
        assert all(torch.equal(a, b) for a, b in zip(mirrored[2], mirrored[2], strict=True))


def test_samples_hold_masks_only_to_train_on_them(voc_folder: Path) -> None:
    """Drawn masks would be sent to every process that loads samples."""
    items = read_dataset(voc_folder, quiet=True).train_images
    assert all(item.mask is None for item in AugmentedImages(items, Schedule(), TrainConfig(), n_classes=3).items)
    truth = AugmentedImages(items, Schedule(), TrainConfig(), n_classes=3, truth=True)
    assert all(item.mask is not None for item in truth.items)
