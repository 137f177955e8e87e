"""The kvmmu command: one file per subcommand."""
# Below: arch, memory, walk, mmu, vm, tables, tlb, traces, images, replay, report, comparison, oracles, kvmmu
# Order: parsing, output, format_options, sources, synthetic, image_target, image_info, replay, compare, convert, info, pt, read,
#     walk, spt, scenario, diff, added_formats, command

from kvmmu.cli.command import main

__all__ = ["main"]
