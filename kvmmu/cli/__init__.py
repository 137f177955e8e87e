"""The kvmmu command: one file per subcommand."""
# Below: arch, vm, tables, traces, replay, report, kvmmu
# Order: parsing, output, sources, synthetic, replay, convert, info, walk, spt, command

from kvmmu.cli.command import main

__all__ = ["main"]
