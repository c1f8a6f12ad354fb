"""What was measured beside ours in both reports and is not ours: how fast the machine was, then and now."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import median

from multisa.benchmarks.report.cells import Row, full_name, is_ours, number, plain
from multisa.benchmarks.report.figures import TIME, common, figures

Rows = Mapping[tuple[str, ...], Row]

_FIGURES = ("latency p50", "end to end", "median")
# The packages that the others run on: of other versions they tell nothing of the machine.
_PACKAGES = {
    "segment": ("torch",),
    "label": ("torch", "scipy", "pydensecrf2"),
    "kernels": ("torch", "scipy", "pydensecrf2"),
}


class Yardsticks:
    """The rows of others' code that ran in both reports. environments: new and old."""

    def __init__(self, stage: str, new: Rows, old: Rows, environments: tuple[Row, Row]) -> None:
        self._stage = stage
        self._found: dict[tuple[str, ...], list[tuple[str, float]]] = defaultdict(list)
        self._others = [versions for name in _PACKAGES[stage] if (versions := _differing(name, environments))]
        for key, then in old.items():
            now = new.get(key)
            if now is None or is_ours(stage, now) or then.get("problem") or now.get("problem"):
                continue
            # Of segmenting only eager: how fast the compiled one is, is not the machine alone.
            if stage == "segment" and not (then.get("baseline") and now.get("baseline")):
                continue
            taken = _times_as_long(stage, now, then)
            if taken is not None:
                self._found[self._place(now)].append((full_name(stage, now), taken))

    @property
    def are_alike(self) -> bool:
        """Whether they are of the same versions: only then they say something of the machine."""
        return not self._others

    def notes(self, tolerance: float) -> Iterator[str]:
        """That the machine was not as it was, or that nothing tells."""
        if self._found and self._others:
            yield (
                f"{'; '.join(self._others)}: what is not ours does not tell how fast the machine was, and "
                "ratios to it are not compared."
            )
            return
        for found in self._found.values():
            for name, factor in found:
                if abs(factor - 1) > tolerance:
                    yield (
                        f"{name} takes {number(factor)} times as long as then, and is not ours: the machine "
                        "was not as it was."
                    )

    def drift(self, row: Row) -> float:
        """How many times as long the machine takes for what has not changed; 1 where nothing tells."""
        found = self._found.get(self._place(row))
        return median(factor for _, factor in found) if found and self.are_alike else 1.0

    def _place(self, row: Row) -> tuple[str, ...]:
        """Where one must have been measured to tell of the row: its kernel and size, or its device."""
        keys = ("kernel", "size") if self._stage == "kernels" else ("device",)
        return tuple(str(row.get(key)) for key in keys)


def _times_as_long(stage: str, now: Row, then: Row) -> float | None:
    new, old = figures(stage, now), figures(stage, then)
    label = next((one for one in _FIGURES if one in new and one in old), None)
    pair = None if label is None else common(old[label], new[label])
    if label is None or pair is None:
        return None
    ratio = pair.new / pair.old if pair.ratio is None else pair.ratio
    return ratio if old[label].kind == TIME else 1 / ratio


def _differing(package: str, environments: tuple[Row, Row]) -> str:
    """The versions now and then, where they differ; how it was built ("+cpu") is not looked at."""
    now, then = (str((one.get("versions") or {}).get(package) or "") for one in environments)
    same = now.partition("+")[0] == then.partition("+")[0]
    return "" if same else plain(f"{package} {then or 'absent'} then, {now or 'absent'} now")
