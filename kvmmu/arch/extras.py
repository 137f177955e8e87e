"""Optional packages: the error of one that is missing, which says how to install it."""

import shlex
import sys

__all__ = ["missing_extra"]


def missing_extra(what: str, extra: str) -> ImportError:
    """Return the error of a package that is not installed, with the command that installs it for the Python that runs.

    Parameters
    ----------
    what : str
        What needs which package: "figures need matplotlib".
    extra : str
        The extra of kvmmu that brings the package.
    """
    python = shlex.quote(sys.executable or "python")        # a program that embeds Python may have no name for it
    return ImportError(f"{what}, the extra kvmmu[{extra}]: {python} -m pip install 'kvmmu[{extra}]'")
