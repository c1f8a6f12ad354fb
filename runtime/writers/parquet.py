"""`parquet`: OUT/parquet/000012.parquet, a row of statistics for each image, without the masks.

Columns are named as in labels.jsonl. `pixel_shares` is a struct with a field for every class, 0 if absent;
`details` holds the keys that only one command writes, as JSON.
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from multisa.runtime.errors import BackendUnavailable
from multisa.runtime.writers.base import LabelledImage, ShardFiles, Writer, WriterContext, json_bytes, shard_path

# Arrow types of the columns that the records of every command have.
_COLUMNS = {
    "index": "int64",
    "image": "string",
    "name": "string",
    "mask": "string",
    "width": "int32",
    "height": "int32",
    "orientation": "int8",
    "confidence": "float64",
    "uncertainty": "float64",
    "disagreement": "float64",
}
_LISTS = ("classes", "notes")
_COMPRESSION = "zstd"


class ParquetWriter(Writer):
    """One table for each shard."""

    def __init__(self, context: WriterContext) -> None:
        super().__init__(context)
        if importlib.util.find_spec("pyarrow") is None:
            raise BackendUnavailable(
                "pyarrow, which writes Parquet, is not installed", remedy='pip install "multisa[parquet]"'
            )

    def encode(self, image: LabelledImage) -> Mapping[str, Any]:
        record = image.record
        shares = record["pixel_shares"]
        known = {*_COLUMNS, *_LISTS, "pixel_shares"}
        row: dict[str, Any] = {name: record.get(name) for name in _COLUMNS}
        row |= {"index": image.index, "image": image.id, "name": image.name}
        row |= {name: list(record.get(name, ())) for name in _LISTS}
        row["pixel_shares"] = {name: shares.get(name, 0.0) for name in self.context.manifest.classes}
        row["details"] = json_bytes({k: v for k, v in record.items() if k not in known}).decode()
        return row

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[Mapping[str, Any]]) -> None:
        if not payloads:  # all images of the shard failed
            return
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(list(payloads), schema=self._schema())
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, compression=_COMPRESSION)
        files.write(shard_path("parquet", shard, "parquet"), buffer.getvalue())

    def _schema(self) -> Any:
        import pyarrow

        fields = [pyarrow.field(name, kind) for name, kind in _COLUMNS.items()]
        fields += [pyarrow.field(name, pyarrow.list_(pyarrow.string())) for name in _LISTS]
        shares = [pyarrow.field(name, pyarrow.float64()) for name in self.context.manifest.classes]
        fields += [pyarrow.field("pixel_shares", pyarrow.struct(shares)), pyarrow.field("details", pyarrow.string())]
        return pyarrow.schema(fields)
