"""What README.md and docs/ say is true: commands and Python code run, options exist, links lead somewhere.

Blocks of one page run in order, in one folder with images, labels and ground truth, as a reader would run
them. `<!-- test: skip REASON -->` above a block leaves it out; its options are checked all the same.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.cli.main import COMMANDS, root
from multisa.training.config import load_config
from multisa.training.pipeline import check_networks

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if not path.name.endswith(".in.md")
}
README = PAGES["README.md"]
CLI_PAGE = "docs/cli.md"
DEMO_IMAGES = ROOT / "runtime" / "demo_images"
MOST_LINES = 150  # of README.md
MOST_VERBS = 7  # of the Makefile
BLOCK = re.compile(r"(?:<!-- test: skip (.+?) -->\n)?^```(python|bash|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code in a page."""

    page: str
    line: int  # of its first line of code, from 1
    language: str
    code: str
    skipped: str  # the reason, or ""

    def commands(self) -> list[list[str]]:
        """Arguments of every line that calls multisa, without the program's name."""
        lines = [line.strip() for line in self.code.replace("\\\n", " ").splitlines()]
        calls = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        return [call[1:] for call in calls if call and call[0] == "multisa"]


def blocks_of(page: str) -> list[Block]:
    text = PAGES[page]
    return [
        Block(page, text[: found.start(3)].count("\n") + 1, found[2], found[3], found[1] or "")
        for found in BLOCK.finditer(text)
    ]


def all_commands() -> Iterator[tuple[Block, list[str]]]:
    for page in PAGES:
        for block in blocks_of(page):
            if block.language != "python":
                yield from ((block, arguments) for arguments in block.commands())


PAGES_WITH_CODE = [page for page in PAGES if any(not block.skipped for block in blocks_of(page))]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages speak of: photo.jpg, photos/, labels.csv, truth/, and a bundle."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "truth").mkdir()
    for path in sorted(DEMO_IMAGES.glob("*.jpg")):
        shutil.copy(path, tmp_path / "photos")
        with Image.open(path) as image:
            mask = Image.fromarray(np.zeros((image.height, image.width), np.uint8))
        mask.save(tmp_path / "truth" / f"{path.stem}.png")
    shutil.copy(DEMO_IMAGES / "astronaut.jpg", tmp_path / "photo.jpg")
    shutil.copy(DEMO_IMAGES / "labels.csv", tmp_path / "labels.csv")
    (tmp_path / "bundle").symlink_to(default_bundle_path())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_code_runs(page: str, workspace: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.skipped:
            continue
        if block.language == "python":
            # Tracebacks show the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            exec(code, names)
            continue
        for arguments in block.commands():
            command = [sys.executable, "-m", "multisa.runtime.cli.main", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{page}:{block.line}: {shlex.join(arguments)}\n{result.stderr}"


@pytest.mark.parametrize(("block", "arguments"), [pytest.param(*c, id=" ".join(c[1])) for c in all_commands()])
def test_commands_are_accepted(block: Block, arguments: list[str]) -> None:
    """Every command is parsed, nothing is run."""
    name, *rest = arguments
    with click.Context(root, info_name="multisa") as parent:
        command = root.get_command(parent, name)
        assert command is not None, f"{block.page}:{block.line}: no command {name}"
        command.make_context(name, rest, parent=parent)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("CHANGELOG.md", "CONTRIBUTING.md")])
def test_options_exist(page: str) -> None:
    """Every option that a text names is one of some command, or of another program's."""
    known = {"--help", "--fresh", "--tensorrt"}  # of click, and of benchmarks/gpu.sh
    with click.Context(root) as context:
        for command in (root, *(root.get_command(context, name) for name in COMMANDS)):
            assert command is not None
            for one in (command, *getattr(command, "commands", {}).values()):
                known |= {option for param in one.params for option in param.opts}
    named = set(re.findall(r"`(--[a-z0-9-]+)", PAGES[page]))
    assert named <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown(command: str) -> None:
    assert any(f"multisa {command}" in text for page, text in PAGES.items() if page != "CHANGELOG.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings}, anchor


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.startswith("docs/"):
            assert f": {page.removeprefix('docs/')}\n" in navigation, page


def test_verbs_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, text in PAGES.items():
        # At the start of a line or in backticks it is a command, elsewhere a word.
        for verb in set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)):
            assert re.search(rf"^{verb}:", makefile, re.MULTILINE), f"{page}: make {verb}"
    (line,) = re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)
    assert len(line.split()) <= MOST_VERBS


def test_files_that_are_named_exist() -> None:
    """Paths of sources in backticks, such as `runtime/cli/options.py`."""
    for page, text in PAGES.items():
        if page != "CHANGELOG.md":
            pattern = r"`((?:kernels|runtime|training|export|benchmarks|tests|docs)/[\w/.-]+\.\w+)`"
            for path in re.findall(pattern, text):
                assert (ROOT / path).exists() or "NAME" in path, f"{page}: {path}"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_facts_about_the_packaged_bundle() -> None:
    manifest = load_bundle(default_bundle_path()).manifest
    names = ", ".join(manifest.foreground)
    assert f"knows six classes: {names}." in README
    assert len(manifest.foreground) == 6
    assert f"Their ids, from 1, are: {names}." in PAGES["docs/quickstart.md"]
    assert f"({manifest.foreground[0]} = 1, ...)" in PAGES["docs/quickstart.md"]


def test_accuracy_is_that_of_the_training() -> None:
    run = json.loads((ROOT / "benchmarks/results/voc-animals.json").read_text(encoding="utf-8"))
    rows = run["rows"]
    segmenter = next(row for row in rows if row["stage"] == "DeepLabV3+ on pseudo-masks")
    *_, masks = (row for row in rows if row["measured_on"] == "train")
    counts = run["images"]
    for fact in (f"{segmenter['miou']:.1f} mIoU", f"{masks['miou']:.1f} mIoU"):
        assert fact in README
    assert f"({counts['val']} val images)" in README
    assert f"on the {counts['train']} train images with" in README


def test_no_mask_chose_anything_in_the_packaged_bundle() -> None:
    """As README.md says."""
    config = json.loads((ROOT / "benchmarks/results/voc-animals.json").read_text(encoding="utf-8"))["config"]
    assert (config["background_from"], config["balance_background"]) == ("yen", True)
    assert config["affinity_labels"]["foreground"] is None


@pytest.mark.slow
def test_tables_are_those_of_the_results() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_settings_can_be_used() -> None:
    """The `--set` options of each command, and each that a text names, up to where weights are read."""
    passages = [[word for word in arguments if re.match(r"[\w.]+=", word)] for _, arguments in all_commands()]
    passages += [[found] for text in PAGES.values() for found in re.findall(r"`--set (\S+=\S+)`", text)]
    tried = [settings for settings in passages if settings]
    assert len(tried) >= 3
    for settings in tried:
        check_networks(load_config("lite0", settings), 7)


@pytest.mark.slow
def test_site_builds_without_warnings_and_without_other_hosts(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:link|script|img|iframe)\b[^>]*(?:href|src)="(?:https?:)?//[^"]*', text), page
