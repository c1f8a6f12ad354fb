"""What a run of the suite is about, and how long it may take."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.benchmarks.suite.sample import Photograph
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import UsageError
from multisa.training.data import Dataset, Item, read_dataset


@dataclass(frozen=True)
class Effort:
    """How often, and on how many photographs."""

    latency_photographs: int  # whose latencies are taken, in `rounds` rounds
    rounds: int
    masks: int  # photographs that mIoU and agreement are of
    end_to_end: int  # photographs from file to file, in `turns` turns
    turns: int
    batches: tuple[int, ...]
    sides: tuple[int, ...]  # long sides in pixels
    repeats: int  # of each point of a curve
    labelled: int  # photographs through the recipes of labelling
    is_quick: bool  # kernels: fewer repeats, no dense matrix; torch.compile only where --engines names it
    dense_side: int  # pixels: of the one photograph whose matrix is squared; it takes their sixth power


FULL = Effort(
    latency_photographs=24,
    rounds=5,
    masks=10_000,
    end_to_end=96,
    turns=3,
    batches=(1, 2, 4, 8),
    sides=(256, 512, 768, 1024),
    repeats=5,
    labelled=48,
    is_quick=False,
    dense_side=512,
)
QUICK = Effort(
    latency_photographs=8,
    rounds=3,
    masks=32,
    end_to_end=24,
    turns=3,
    batches=(1, 4),
    sides=(256, 512),
    repeats=3,
    labelled=9,
    is_quick=True,
    dense_side=192,
)


@dataclass(frozen=True)
class Setting:
    """The bundle, the data set, the engines and the effort of one run."""

    bundle: Bundle
    dataset: Dataset
    engines: tuple[str, ...]  # empty: all
    plans: Path | None
    effort: Effort
    scratch: Path  # a folder for what is thrown away

    @property
    def states(self) -> Path:
        """Where PyTorch's networks are kept."""
        return self.scratch / "states"

    @cached_property
    def pytorch_problem(self) -> str:
        """Why PyTorch cannot take part; else nothing, and its networks are in `states`."""
        try:
            with Guest(write_states, self.bundle.path, self.states):
                return ""
        except GuestFailedError as error:
            return str(error)

    @property
    def val(self) -> list[Photograph]:
        """Photographs with truth that nothing was learnt from."""
        return [_photograph(self.dataset, item) for item in self.dataset.val if item.mask]

    @property
    def train(self) -> list[Photograph]:
        """Photographs with image-level labels and truth."""
        items = [item for item in self.dataset.train if item.mask and item.classes]
        return [_photograph(self.dataset, item) for item in items]


def write_states(bundle: Path, folder: Path) -> object:
    """What a guest runs where torch is."""
    from multisa.benchmarks.suite.eager_state import States

    return States(bundle, folder)


def make_setting(
    bundle: Path, data: Path, scratch: Path, *, engines: tuple[str, ...], plans: Path | None, quick: bool
) -> Setting:
    """Read the bundle and the data set. Raises UsageError where they do not belong together."""
    opened, dataset = load_bundle(bundle), read_dataset(data)
    if opened.manifest.classes != dataset.class_names:
        raise UsageError(
            f"{data}: got the classes {', '.join(dataset.class_names)}; expected those of the bundle "
            f"{opened.path}, {', '.join(opened.manifest.classes)}: name another --bundle or --data"
        )
    setting = Setting(opened, dataset, engines, plans, QUICK if quick else FULL, scratch)
    if not setting.val or not setting.train:
        raise UsageError(
            f"{data}: got {len(setting.val)} val photographs with masks and {len(setting.train)} train "
            "photographs with masks and labels, expected some of both: they are what is measured on"
        )
    return setting


def _photograph(dataset: Dataset, item: Item) -> Photograph:
    assert item.mask is not None
    return Photograph(item.id, item.image, item.mask, tuple(dataset.class_names[i] for i in item.classes))
