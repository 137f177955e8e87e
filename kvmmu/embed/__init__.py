"""kvmmu inside other programs: the function table for C, the MMU of an emulator, commands of a debugger."""
# Below: arch, memory, _walk, walk, report, kvmmu
# Order: _structs, _page_cache, _nested_walk, _vcpus, _lookups, _memories, _models, _registers, c_api, _tlb_fill,
#     instructions, unicorn, gdb_commands

from pathlib import Path

__all__ = ["gdb_path"]


def gdb_path() -> str:
    """Return the file of commands that GDB is to `source`."""
    return str(Path(__file__).with_name("gdb_commands.py"))
