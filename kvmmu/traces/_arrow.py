"""PyArrow, which files in columns need (extra `arrow`)."""

from typing import Any

from kvmmu.arch.extras import missing_extra

__all__ = ["pyarrow"]


def pyarrow() -> Any:
    """Return PyArrow, or raise an ImportError that names the extra."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("CSV and Parquet files need PyArrow", "arrow") from None
    return pyarrow
