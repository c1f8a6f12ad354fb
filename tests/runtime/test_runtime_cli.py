"""The command line: output, exit codes, one-line errors, and what it does not import."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import get_args

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from multisa.runtime import api
from multisa.runtime.backends.base import PRECISIONS
from multisa.runtime.backends.registry import ALL_PRECISIONS, BACKENDS, BackendRequest, saturates_int8
from multisa.runtime.bundle import Bundle, LabelMethod, default_bundle_path
from multisa.runtime.bundle import storage as bundle_module
from multisa.runtime.cli import commands, options
from multisa.runtime.cli.main import COMMANDS, root
from multisa.runtime.jobs.spec import RunOptions

INSTALL_EXPORT = 'is not installed: pip install ".[export]" in a clone of the project'


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


def test_segment_label_evaluate(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    (photos / "broken.jpg").unlink()
    out = tmp_path / "out"
    result = run_cli("segment", photos, "-o", out, "--bundle", bundle.path, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "5 images in" in result.stdout and "0 failed" in result.stdout and "busy: " in result.stdout
    (tmp_path / "labels.csv").write_text("image,labels\na.jpg,red thing;green\n")
    labels = ("--labels", tmp_path / "labels.csv")
    result = run_cli("label", photos, "-o", tmp_path / "pseudo", "--bundle", bundle.path, *labels)
    assert result.exit_code == 0, result.output
    assert "labelled with predicted classes: 4 of 5 images: b.png" in result.stderr
    assert result.stdout.endswith(f"open {tmp_path / 'pseudo/report.html'}\n")
    folders = (tmp_path / "pseudo/masks", out / "masks")
    result = run_cli("evaluate", *folders, "--bundle", bundle.path, "--json")
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.stdout)["miou"] < 1
    (tmp_path / "classes.txt").write_text("background\nred thing\ngreen\n")
    (tmp_path / "list.txt").write_text("a\n")
    few = ("--classes", tmp_path / "classes.txt", "--list", tmp_path / "list.txt")
    result = run_cli("evaluate", *folders, *few)
    assert "red thing" in result.stdout and result.stdout.endswith("\n1 image\n")
    result = run_cli("evaluate", *folders, *few, "--bundle", bundle.path)
    assert result.exit_code == 2 and "both --classes and --bundle" in result.stderr


@pytest.mark.parametrize(("limit", "code"), [("0", 4), ("1", 0), ("10%", 4), ("20%", 0), ("few", 2)])
def test_max_failures(photos: Path, bundle: Bundle, tmp_path: Path, limit: str, code: int) -> None:
    out = tmp_path / "out"
    result = run_cli("segment", photos, "-o", out, "--bundle", bundle.path, "--max-failures", limit)
    assert result.exit_code == code
    assert (out / "labels.jsonl").is_file() == (code != 2)  # everything else was finished
    if code:
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_errors_are_one_line(tmp_path: Path, photos: Path) -> None:
    result = run_cli("segment", photos, "-o", tmp_path / "out", "--bundle", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = run_cli("--traceback", "segment", photos, "-o", tmp_path / "out", "--bundle", tmp_path)
    assert result.exit_code == 1 and "Traceback" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", "", ">&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("image", "code"), [("a.jpg", 0), ("broken.jpg", 4), ("absent.jpg", 2)])
def test_standard_streams_that_are_closed_or_take_nothing(
    photos: Path, bundle: Bundle, tmp_path: Path, streams: str, image: str, code: int
) -> None:
    """Without a redirection, standard error is a pipe whose reader has ended."""
    reader, gone = os.pipe()
    os.close(reader)
    arguments = ["-m", "multisa", "segment", photos / image, "-o", tmp_path / "out", "--bundle", bundle.path]
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, *arguments]
    try:
        stderr = subprocess.PIPE if streams else gone
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, check=False)
    finally:
        os.close(gone)
    assert result.returncode == code
    masks = [path.name for path in (tmp_path / "out").rglob("masks/*.png")]
    assert masks == (["a.png"] if code == 0 else [])
    assert bool(result.stderr) == (streams in (">&-", "<&-"))  # else it says which backend runs, or what is wrong


@pytest.mark.parametrize(
    "arguments", [["labels"], ["segment"], ["segment", "a"], ["label", "a", "-o", "b", "--workers", "0"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    assert run_cli(*arguments).exit_code == 2


def test_the_examples_in_the_help_have_only_options_that_there_are() -> None:
    texts = [root.help, *(root.get_command(click.Context(root), name).help for name in COMMANDS)]
    examples = [line.split()[1:] for text in texts for line in re.findall(r"^ *multisa .+$", text or "", re.M)]
    assert len(examples) > len(COMMANDS)
    for name, *arguments in examples:
        options = {o for param in root.get_command(click.Context(root), name).params for o in param.opts}
        assert not {word for word in arguments if word.startswith("-")} - options, (name, arguments)


def test_the_help_names_the_threads_that_read() -> None:
    (readers,) = (option for option in commands.label.params if option.name == "readers")
    sizes = {remote: RunOptions(workers=5).pipeline_config(remote=remote).readers for remote in (False, True)}
    assert sizes == {False: 5, True: 16}
    assert "as many as --workers by default, 16 for images behind a URL" in readers.help


def test_a_bundle_that_is_not_there_is_a_usage_error(tmp_path: Path, photos: Path) -> None:
    absent = tmp_path / "absent"
    for arguments in (("inspect", absent), ("segment", photos, "-o", tmp_path / "o", "--bundle", absent)):
        result = run_cli(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {absent}: does not exist, expected a bundle folder")


def test_what_is_said_of_one_image(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run = ("-o", tmp_path / "out", "--bundle", bundle.path, "--report-images", "0", "--overwrite")
    result = run_cli("segment", photos / "broken.jpg", *run)
    assert result.exit_code == 4
    assert result.stderr.splitlines()[1].startswith("broken.jpg: not an image")
    assert "0 images in" in result.stdout and "(0.00/s), 1 failed" in result.stdout
    assert f"failures: {tmp_path / 'out/failed.jsonl'}" in result.stdout
    result = run_cli("segment", photos / "a.jpg", *run)
    assert result.exit_code == 0 and result.stderr.count("\n") == 1  # which engine runs
    assert "1 image in" in result.stdout and "failed.jsonl" not in result.stdout
    assert result.stdout.endswith(f"open {tmp_path / 'out/masks'}\n")


def test_the_first_few_failures_are_said(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(5):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"no image")
    run = ("-o", tmp_path / "out", "--bundle", bundle.path, "--workers", 1)  # by one thread, in its order
    result = run_cli("segment", tmp_path / "bad", *run)
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["segmenter", "0.jpg", "1.jpg", "2.jpg", "error"]


def test_inspect(bundle: Bundle) -> None:
    result = run_cli("inspect", bundle.path)
    assert result.exit_code == 0 and "file (verified)" in result.stdout
    values = json.loads(run_cli("inspect", bundle.path, "--json").stdout)
    assert values["path"] == str(bundle.path) and values["classes"] == list(bundle.manifest.classes)
    (bundle.path / "cam.onnx").write_bytes(b"")
    result = run_cli("inspect", bundle.path)
    assert result.exit_code == 1 and "cam.onnx" in result.stderr


def test_demo(bundle: Bundle, tmp_path: Path) -> None:
    result = run_cli("demo", "-o", tmp_path / "demo", "--bundle", bundle.path)
    assert result.exit_code == 0, result.output
    assert f"open {tmp_path / 'demo' / 'index.html'}" in result.stdout
    assert "extension" not in result.stderr  # the package's own files
    page = (tmp_path / "demo/index.html").read_text()
    for run in ("label", "segment"):
        masks = sorted(p.name for p in (tmp_path / "demo" / run / "masks").iterdir())
        assert masks == ["astronaut.png", "chelsea.png", "coffee.png"]
        assert f"report/000001.{run}.jpg" in page and "chelsea.jpg" in page
    with Image.open(tmp_path / "demo/demo.jpg") as sheet:
        pixels = np.asarray(sheet.convert("L")).astype(int)
        heights = [360, 239, 240]  # of the images, each 360 wide; 32 above them for the captions
        assert sheet.size == (3 * 360 + 2 * 4, 32 + sum(heights) + 2 * 4)
    for column in range(3):
        left = column * 364
        assert (pixels[:32, left : left + 360] < 100).any()  # a caption
        top = 32
        for height in heights:  # no row ends before the column does
            assert (pixels[top : top + height, left : left + 360] < 250).mean() > 0.9
            assert (pixels[top + 4 : top + height - 4, left + 350 : left + 360] < 250).mean() > 0.9
            top += height + 4


def test_demo_takes_the_label_file_if_the_bundle_has_its_classes(
    bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multisa.runtime import demo

    for name in ("broken.jpg", "deep/c.jpg", "deep/d.png"):
        (photos / name).unlink()
    monkeypatch.setattr(demo, "IMAGES", photos)
    for classes, source in (("green", "file"), ("green cat", "scores")):
        (photos / "labels.csv").write_text(f"image,labels\nb.png,\na.jpg,{classes}\n")
        demo.run_demo(tmp_path / source, bundle, BackendRequest())
        first = json.loads((tmp_path / source / "label/labels.jsonl").read_text().splitlines()[0])
        assert first["image"] == "a.jpg" and first["labels_from"] == source


def test_demo_stops_at_a_failure_before_it_draws(
    bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multisa.runtime import demo

    monkeypatch.setattr(demo, "IMAGES", photos)
    (photos / "labels.csv").write_text("image,labels\na.jpg,green\n")
    result = run_cli("demo", "-o", tmp_path / "demo", "--bundle", bundle.path)
    assert result.exit_code == 4 and "1 of 3 images failed" in result.stderr
    assert not (tmp_path / "demo" / "demo.jpg").exists()


def test_demo_images_have_sources() -> None:
    folder = default_bundle_path().parents[1] / "demo_images"
    sources = (folder / "SOURCES.md").read_text()
    assert all(path.name in sources for path in folder.glob("*.jpg"))


def test_the_default_bundle_is_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "default_bundle_path", lambda: bundle.path)
    assert "tiny" in run_cli("inspect").stdout


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("no torch", name="torch"), 5, INSTALL_EXPORT),
        (ModuleNotFoundError("no onnx", name="onnx.helper"), 5, INSTALL_EXPORT),
        (OSError(28, "No space left on device", "out/a.png"), 1, "error: out/a.png: No space left on device"),
    ],
)
def test_what_ends_a_run(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "run", fail)
    result = run_cli("segment", "photos", "-o", "out", "--bundle", bundle.path)
    assert result.exit_code == code
    assert text in result.stderr


def test_a_missing_module_of_our_own_is_not_explained_away(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("no such", name="multisa.lost")

    monkeypatch.setattr(api, "run", fail)
    result = run_cli("segment", "photos", "-o", "out", "--bundle", bundle.path)
    assert isinstance(result.exception, ModuleNotFoundError)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(name: str) -> None:
    result = run_cli(name, "--help")
    assert result.exit_code == 0
    examples = result.stdout.split("Example:")[1]
    assert f"multisa {name}" in examples
    for line in examples.splitlines():  # VOC's ids are not those of the bundle in the package
        assert "evaluate" not in line or "VOC2012" not in line or "--classes" in line


def test_help_lists_every_command() -> None:
    page = run_cli("--help").stdout
    for name, (_, help_line) in COMMANDS.items():
        assert name in page and help_line in page


def test_process_exit_codes_and_streams(bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "multisa.runtime.cli.main", "segment", "absent", "-o", "out"]
    command += ["--bundle", str(bundle.path)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    error = "error: absent: does not exist, expected a folder of images, one image, a pattern (photos/"
    assert finished.stderr.splitlines()[-1].startswith(error)


def test_running_loads_no_torch(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys; from multisa.runtime.cli.main import root\n"
        "root(sys.argv[1:], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'onnx', 'pydensecrf'} & set(sys.modules)))\n"
    )
    arguments = ["label", str(photos / "a.jpg"), "-o", str(tmp_path / "out"), "--bundle", str(bundle.path)]
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "heavy: []" in finished.stdout


def test_the_doctor_finds_torch_without_loading_it(bundle: Bundle) -> None:
    code = (
        "import sys; from multisa.runtime.doctor import examine\n"
        "print(examine(__import__('pathlib').Path(sys.argv[1])).versions['torch'], 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(bundle.path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == [metadata.version("torch"), "False"]


def test_engine_and_precision(photos: Path, bundle_of_precisions: Bundle, tmp_path: Path) -> None:
    run = ("-o", tmp_path / "out", "--bundle", bundle_of_precisions.path)
    result = run_cli("segment", photos / "a.jpg", *run, "--backend", "onnxruntime-cpu", "--precision", "int8")
    assert result.exit_code == 0
    selected, *warnings = result.stderr.splitlines()
    assert selected == "segmenter: onnxruntime-cpu, int8 (requested)"
    assert ["no VNNI" in line for line in warnings] == [True] * saturates_int8()
    assert "background" not in json.loads((tmp_path / "out/labels.jsonl").read_text())["pixel_shares"]
    result = run_cli("label", photos / "a.jpg", *run, "--precision", "int8", "--overwrite")
    assert result.exit_code == 2 and "has cam in fp32 and fp16, got --precision int8" in result.stderr
    result = run_cli("demo", *run, "--backend", "opencv")
    assert result.exit_code == 2 and "got the backend 'opencv'" in result.stderr


@pytest.mark.parametrize("command", ["label", "segment"])
def test_an_engine_that_is_not_there(command: str, photos: Path, bundle: Bundle, tmp_path: Path, no_gpu: None) -> None:
    run = ("-o", tmp_path / "out", "--bundle", bundle.path, "--backend", "tensorrt")
    result = run_cli(command, photos, *run)
    assert result.exit_code == 5 and result.stderr.startswith("error: tensorrt cannot run ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["label", "segment", "demo"])
def test_help_names_every_engine_and_precision(command: str) -> None:
    page = " ".join(run_cli(command, "--help").stdout.split()).replace("- ", "-")
    for name in (*BACKENDS, *PRECISIONS):
        assert name in page


def test_names_that_are_completed_are_those_of_the_library() -> None:
    assert tuple(BACKENDS) == options.BACKENDS
    assert set(options.PRECISIONS) == set(ALL_PRECISIONS)
    assert get_args(LabelMethod) == options.METHODS


def test_the_method_and_the_smallest_area(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run = ("label", photos / "a.jpg", "-o", tmp_path / "out", "--bundle", bundle.path)
    assert run_cli(*run, "--method", "segmenter", "--min-area", "0.001").exit_code == 0
    record = json.loads((tmp_path / "out/.multisa/run.json").read_text())
    assert (record["label_method"], record["min_area"]) == ("segmenter", 0.001)
    result = run_cli(*run, "--method", "walk", "--min-area", "0.001")
    assert result.exit_code == 2 and "label method: got walk, the existing run has segmenter" in result.stderr
    for wrong in (("--method", "cam"), ("--min-area", "1"), ("--min-area", "-0.1")):
        assert run_cli(*run, *wrong).exit_code == 2
    result = run_cli("segment", photos / "a.jpg", "-o", tmp_path / "segment", "--method", "walk")
    assert result.exit_code == 2 and "No such option" in result.stderr


def test_a_misspelt_command_brings_the_closest_one() -> None:
    result = run_cli("segmnt", "photos")
    assert result.exit_code == 2 and "Did you mean segment?" in result.stderr


def test_quiet_prints_results_and_nothing_else(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run = ("segment", photos / "a.jpg", "-o", tmp_path / "out", "--bundle", bundle.path)
    result = run_cli("--quiet", *run)
    assert result.exit_code == 0 and result.stderr == "" and "1 image in" in result.stdout
    assert not any(
        line.startswith(("busy", "no stage", "the bottleneck", "open")) for line in result.stdout.splitlines()
    )
