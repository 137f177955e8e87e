"""Exceptions of the formats that other packages add: they are faults of those packages, not of kvmmu."""

from traceback import walk_tb

from kvmmu.images import ImageError
from kvmmu.images.opening import GROUP as IMAGES
from kvmmu.traces import TraceError
from kvmmu.traces.opening import GROUP as TRACES

__all__ = ["raised_by_format"]

_KINDS = {TRACES: "trace", IMAGES: "image"}


def raised_by_format(error: Exception) -> str:
    """Return what the format of another package raised, and where; an empty string if kvmmu raised it.

    A TraceError or ImageError of a format says what is wrong with the file, so it counts as one of kvmmu.
    """
    if isinstance(error, (TraceError, ImageError)):
        return ""
    from importlib.metadata import entry_points  # takes 10 ms

    points = [(f"{kind} format {point.name!r}", point.module) for group, kind in _KINDS.items()
              for point in entry_points(group=group)]
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__"))
        of_module = [name for name, where in points if where == module]
        of_package = [name for name, where in points if where.partition(".")[0] == module.partition(".")[0]]
        if names := of_module or of_package:
            place = f"{frame.f_code.co_filename}, line {line}"
            return f"the {' or the '.join(dict.fromkeys(names))} raised {type(error).__name__} ({place}): {error}"
    return ""
