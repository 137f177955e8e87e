"""The kvmmu command: one file per subcommand."""
# Below: arch, vm, traces, replay, report, kvmmu
# Order: parsing, output, sources, replay, convert, walk, spt, command

from kvmmu.cli.command import main

__all__ = ["main"]
