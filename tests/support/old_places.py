# SPDX-License-Identifier: Apache-2.0
"""Parquet traces as earlier versions wrote them: with places of the addresses alone."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def of_old_places(table):
    """Return a table of places as earlier versions wrote it."""
    place = table["place"].to_numpy()
    page, frame, op, access = (table[name].to_numpy()[place >> 12] for name in ("page", "frame", "page_op", "page_access"))
    pairs, number = np.unique(np.stack([page, frame], 1), axis=0, return_inverse=True)
    pairs = np.pad(pairs, ((0, len(table) - len(pairs)), (0, 0)), "edge")
    made = {"op": op, "place": (number.ravel() << 12 | place & 4095).astype(np.uint32), "page": pairs[:, 0], "frame": pairs[:, 1],
            "access": access}
    names = ["size", "vcpu", "value", "ip"]
    return pa.table(made | {name: table[name] for name in names}, schema=pa.schema(
        [pa.field(name, pa.from_numpy_dtype(column.dtype), nullable=False) for name, column in made.items()]
        + [table.schema.field(name) for name in names])).replace_schema_metadata(table.schema.metadata)


def write_old_places(path):
    """Write the file anew, as earlier versions did."""
    file = pq.ParquetFile(path)
    tables = [of_old_places(file.read_row_group(group)) for group in range(file.num_row_groups)]
    metadata = file.metadata.metadata
    file.close()
    schema = of_old_places(pq.read_table(path)[:0]).schema.with_metadata(metadata)
    with pq.ParquetWriter(path, schema, compression="lz4", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(metadata))
