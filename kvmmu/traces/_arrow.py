"""PyArrow, which files in columns need (extra `arrow`)."""

from typing import Any

__all__ = ["pyarrow"]


def pyarrow() -> Any:
    """Return PyArrow, or raise an ImportError that names the extra."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise ImportError("CSV and Parquet files need PyArrow, the extra kvmmu[arrow]: pip install 'kvmmu[arrow]'") from None
    return pyarrow
