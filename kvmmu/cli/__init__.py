"""The kvmmu command: one file per subcommand."""
# Below: arch, memory, walk, vm, tables, tlb, traces, images, replay, report, kvmmu
# Order: parsing, output, sources, synthetic, image_target, image_info, replay, convert, info, pt, read, walk, spt, command

from kvmmu.cli.command import main

__all__ = ["main"]
