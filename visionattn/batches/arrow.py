"""pyarrow, or one sentence that says how to install it."""

from visionattn.errors import UsageError

try:
    import pyarrow as pa
except ImportError as error:
    raise UsageError("visionattn.batches needs pyarrow: pip install 'visionattn[parquet]'") from error

__all__ = ["pa"]
