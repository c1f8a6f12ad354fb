"""Backbones of every family: levels at every size, taps, what is frozen, and models that cannot be used."""

from pathlib import Path

import pytest
import torch

from multisa.runtime.errors import UsageError
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import PYRAMID_STRIDES, Backbone, layout_of
from multisa.training.config import CamConfig, SegmenterConfig, load_config
from multisa.training.models import create_model, with_taps
from multisa.training.multi_sa import MultiScaleCAM
from multisa.training.pipeline import check_networks, train
from multisa.training.run_record import load_run
from multisa.training.segmenter import SegmentImages
from multisa.training.stage_cache import load_stage

TINY = Path(__file__).with_name("tiny.toml")
SIZES = ((64, 64), (65, 97), (79, 64), (224, 224))
FAMILIES = {  # strides, taps
    "resnet18": ((2, 4, 8, 16, 16), (2, 3, 4)),
    "convnext_atto": ((4, 8, 16, 16), (1, 2, 3)),
    "test_convnext": ((4, 8, 16, 16), (1, 2, 3)),
    "test_vit": (PYRAMID_STRIDES, (1, 2, 3)),
    "vit_tiny_patch16_224": (PYRAMID_STRIDES, (1, 2, 3)),
    "vit_small_patch14_dinov2": (PYRAMID_STRIDES, (1, 2, 3)),  # patches of 14 pixels
    "swin_tiny_patch4_window7_224": ((4, 8, 16, 32), (1, 2, 3)),  # gives [N, h, w, C]
    "vgg11_bn": ((1, 2, 4, 8, 16, 32), (3, 4, 5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_levels_of_every_size(name: str) -> None:
    layout = layout_of(name)
    assert (layout.strides, layout.taps) == FAMILIES[name]
    backbone = Backbone(name, weights="none").eval()
    for size in SIZES[:3] if backbone.layout.patch == 14 else SIZES:
        with torch.inference_mode():
            levels = backbone(torch.randn(1, 3, *size))
        expected = [
            (c, *(-(-side // stride) for side in size))
            for c, stride in zip(layout.channels, layout.strides, strict=True)
        ]
        assert [tuple(level.shape[1:]) for level in levels] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_the_networks_run_on_transformers_and_convnexts(name: str) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 65, 97, 3), dtype=torch.uint8)
    cam = create_model(CamConfig(backbone=name, weights="none"), 4).eval()
    segmenter = create_model(SegmenterConfig(backbone=name, weights="none", decoder_channels=8), 4).eval()
    affinity = AffinityNet(Backbone(name, weights="none"), head="features").eval()
    with torch.inference_mode():
        maps, scores = MultiScaleCAM(cam, scales=(0.5, 1.0))(image)
        probabilities = SegmentImages(segmenter)(image)
        affinities = affinity(affinity.backbone.normalise(image), 3)
    assert maps.shape == (1, 3, 17, 25) and scores.shape == (1, 3)
    assert probabilities.shape == (1, 4, 17, 25) and affinities.shape[-2:] == (9, 13)


def test_padding_changes_only_what_lies_beyond_the_image() -> None:
    torch.manual_seed(0)
    backbone = Backbone("test_convnext", weights="none").eval()
    image = torch.randn(1, 3, 64, 96)
    inside = image[..., :80]
    padded = torch.cat([inside, torch.zeros(1, 3, 64, 16)], -1)
    with torch.inference_mode():
        # 80 is a multiple of 16, so nothing is added; 81 is padded to 96 with zeros.
        wider = torch.cat([inside, torch.zeros(1, 3, 64, 1)], -1)
        for short, whole, stride in zip(backbone(wider), backbone(padded), backbone.strides, strict=True):
            torch.testing.assert_close(short, whole[..., : -(-81 // stride)])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_net", "not a timm model"),
        ("mixer_s16_224", r"does not take images of every size \(.*224.*\); choose another, for example resnet50"),
    ],
)
def test_models_that_cannot_be_used_are_one_line(name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as raised:
        layout_of(name)
    assert "\n" not in str(raised.value)


def test_taps_are_chosen_from_the_model_shown_and_changed(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(str(TINY), ["cam.backbone=test_convnext"])
    check_networks(config, 3)
    assert "levels at strides 4, 8, 16, 16; taps 1 (stride 8), 2 (stride 16), 3 (stride 16), chosen" in (
        capsys.readouterr().err
    )
    given = load_config(str(TINY), ["cam.backbone=test_convnext", "cam.taps=[0, 3]"])
    check_networks(given, 3)
    assert "taps 0 (stride 4), 3 (stride 16), as configured" in capsys.readouterr().err
    assert with_taps(given.cam).taps == (0, 3)
    with pytest.raises(UsageError, match=r"cam\.taps: got \[2, 4\], .*0\.\.3, .*; set cam\.taps=\[1, 2, 3\]"):
        check_networks(load_config(str(TINY), ["cam.backbone=test_convnext", "cam.taps=[2, 4]"]), 3)


def test_a_share_of_a_transformers_blocks_is_frozen() -> None:
    backbone = Backbone("test_vit", weights="none")
    backbone.freeze(2)
    network = backbone.network.get_submodule("model")
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks.")} == {"0", "1", "2"}  # of six
    assert {"pos_embed", "patch_embed.proj.weight"} <= frozen
    assert all(parameter.requires_grad for parameter in backbone.new_parameters())
    # The boundary head trains on frozen weights, but those of the pyramid come from nowhere.
    boundary = AffinityNet(Backbone("test_vit", weights="none"), head="boundary")
    trained = {id(p) for p in boundary.parameters() if p.requires_grad}
    assert trained == {id(p) for p in boundary.new_parameters()}


@pytest.mark.slow
def test_finished_runs_keep_their_digests(tiny_run: Path) -> None:
    """The inputs of stages are those of configurations that name every setting, as they always were."""
    cam = load_stage(load_run(tiny_run).folder(tiny_run, "cam"))["inputs"]["cam"]
    assert cam["taps"] == [2, 3, 4] and cam["weights"] == "none" and "init_from" not in cam


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_the_whole_pipeline_on_transformers_and_convnexts(voc_folder: Path, tmp_path: Path, name: str) -> None:
    from multisa.export.bundle import ExportOptions, export_bundle
    from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from multisa.training.data import read_dataset
    from multisa.training.loop import CHECKPOINT

    overrides = [f"{part}.backbone={name}" for part in ("cam", "affinity", "segmenter")]
    overrides += ["paper_rows=false", "cam.schedule.epochs=1", "segmenter.schedule.epochs=1", "cam.scales=[1.0]"]
    dataset = read_dataset(voc_folder)
    run = train(load_config(str(TINY), overrides), dataset, tmp_path / "run")
    assert run.config.cam.taps == (1, 2, 3) and len(run.betas) == 3
    bundle = export_bundle(tmp_path / "run", dataset, tmp_path / "bundle", ExportOptions(num_images=2)).bundle
    checkpoint = run.folder(tmp_path / "run", "segmenter") / CHECKPOINT
    network = create_model(run.config.segmenter, len(run.classes), checkpoint=checkpoint)
    for size in ((64, 96), (65, 97), (200, 112)):
        image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with OnnxRuntimeBackend(bundle.read_file("segmenter.onnx")) as backend, torch.inference_mode():
            got, expected = backend.run(image.numpy())["probabilities"], SegmentImages(network)(image)
        torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-3, rtol=1e-3)
