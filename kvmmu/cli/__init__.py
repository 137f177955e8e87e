"""The kvmmu command: one file per subcommand."""
# Below: arch, walk, vm, traces, images, replay, report, kvmmu
# Order: parsing, output, sources, image_target, image_info, replay, convert, pt, read, walk, spt, command

from kvmmu.cli.command import main

__all__ = ["main"]
