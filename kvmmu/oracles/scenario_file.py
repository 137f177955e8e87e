"""Files of scenarios: JSON of one, a list of them, or one on each line; compressed by gzip or not."""

import gzip
import json
import zlib
from os import PathLike
from typing import Any

from kvmmu.arch.files import check_path, open_regular
from kvmmu.oracles.operations import check_scenario

__all__ = ["read_scenarios"]

_GZIP = b"\x1f\x8b"
_BYTES_MAX = 1 << 28                        # of text


def read_scenarios(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the scenarios of a file, each checked.

    Raises
    ------
    ValueError
        It is no regular file, no JSON, or one is not of the form that docs/scenarios.md describes.
    """
    with open_regular(check_path("path", path), ValueError) as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        try:
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(_BYTES_MAX + 1)
        except (OSError, EOFError, zlib.error) as error:
            if not packed:
                raise
            raise ValueError(f"{path}: it cannot be decompressed: {error}") from None
    if len(data) > _BYTES_MAX:
        raise ValueError(f"{path}: it has more than {_BYTES_MAX:#x} bytes of text")
    found = _parse(path, data)
    if not found:
        raise ValueError(f"{path}: there is no scenario in it")
    for i, scenario in enumerate(found):
        try:
            check_scenario(scenario)
        except ValueError as error:
            raise ValueError(f"{path}: {f'scenario {i}: ' if len(found) > 1 else ''}{error}") from None
    return found


def _parse(path: str | PathLike[str], data: bytes) -> list[Any]:
    try:
        text = data.decode()
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            lines = [line for line in text.splitlines() if line.strip()]
            if len(lines) < 2 or error.msg != "Extra data":
                raise
            return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is no JSON: {error}") from None
    return whole if isinstance(whole, list) else [whole]
