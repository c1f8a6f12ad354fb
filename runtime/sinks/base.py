"""What most formats have in common: no soft maps, nothing at the end, no file named after an image."""

from collections.abc import Sequence

from multisa.runtime.sinks.contract import RunFolder, SinkContext


class FormatSink:
    """The part of a sink that a format leaves as it is."""

    needs_soft_maps = False

    def __init__(self, context: SinkContext) -> None:
        self.context = context

    def finish(self, folder: RunFolder, shards: int) -> None:
        """Write nothing: every file is one shard's."""

    def results(self, name: str) -> Sequence[str]:
        """No file: they are named after shards."""
        return ()


def shard_path(folder: str, shard: int, ending: str) -> str:
    """Path below OUT of the file of one shard."""
    return f"{folder}/{shard:06d}.{ending}"
