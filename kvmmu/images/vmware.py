"""Memory of VMware's machines: a .vmem file, and the .vmss (suspended) or .vmsn (snapshot) beside it, which says where pages lie.

The second file has groups of tags: flags u8, length of the name u8, name, indices u32, data. Bits 7:6 of the flags are the number
of indices, bits 5:0 the size of the data; 62 and 63 say that their size follows. The group "memory" has regionsCount, and for
each region regionPPN (where it lies in memory), regionPageNum (in the file) and regionSize, in pages. Without the second file
the offset is the address.

The group "cpu" has the registers of each vCPU, whose number is the first index: CR64, control registers by a second index or all
of them in one block, rip, eflags, rax and so on. EFER is not among them.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE, Cr0, Cr4
from kvmmu.images._file import ImageFile, Range, joined, memory_of
from kvmmu.images.image import Image, VcpuState, regs_of

__all__ = ["FORMAT"]

_PAGE = int(PAGE_SIZE)
_MAGICS = (b"\xd0\xbe\xd2\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xbe\xd2\xbe", b"\xd3\xbe\xd3\xbe")
_HEADER = np.dtype([("magic", "V4"), ("unknown", "<u4"), ("groups", "<u4")])
_GROUP = np.dtype([("name", "S64"), ("offset", "<u8"), ("unknown", "<u8")])
_GROUPS_MAX, _TAGS_MAX = 1 << 12, 1 << 20
_STATES = (".vmss", ".vmsn")
_VCPUS_MAX = 1 << 12
_BLOCK_MAX = 1 << 8                         # bytes of a block that is kept
_GENERAL = ("rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
_CONTROL = range(5)                         # registers of CR64 that there are


class _Tags(dict[tuple[str, tuple[int, ...]], int]):
    """The numbers of a group of tags, by name and indices; `blocks` has the short blocks of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[tuple[str, tuple[int, ...]], bytes] = {}


class _Vmware:
    """Reader of .vmem files, and of .vmss and .vmsn files that have one beside them."""

    name = "vmware"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        if head.startswith(_MAGICS):
            return 90
        return 50 if Path(path).suffix == ".vmem" else 0

    def open(self, path: str | PathLike[str]) -> Image:
        path = Path(path)
        file = ImageFile(path)
        if file.data[:4].tobytes() in _MAGICS:
            state, memory = file, path.with_suffix(".vmem")
            if not memory.is_file():
                raise file.fail(f"the memory is in {memory.name}, which is not there")
            file = ImageFile(memory)
        else:
            beside = next((path.with_suffix(suffix) for suffix in _STATES if path.with_suffix(suffix).is_file()), None)
            if beside is None:
                return self._flat(file)
            state = ImageFile(beside)
        damage: list[str] = []
        tags = _tags_of(state, b"memory")
        if tags is None:
            raise state.fail("there is no group of tags 'memory'", _HEADER.itemsize)
        vcpus = _vcpus_of(_tags_of(state, b"cpu") or _Tags(), damage)
        count = tags.get(("regionsCount", ()), 0)
        if not count:
            return self._flat(file, vcpus, damage)
        ranges = []
        for n in range(min(count, _TAGS_MAX)):
            try:
                gpa, offset, size = (tags[name, (n,)] * _PAGE for name in ("regionPPN", "regionPageNum", "regionSize"))
            except KeyError:
                damage.append(f"{state.path}: there is no region {n} of {count}")
                break
            if gpa + size > GPA_LIMIT:
                damage.append(f"{state.path}: region {n}, {size:#x} bytes at gpa {gpa:#x}, ends beyond 52 bits")
                continue
            ranges.append(Range(gpa, offset, size))
        return Image(file.path, self.name, memory_of(file, joined(ranges, damage), damage), vcpus, damage=damage,
                     details={"regions": len(ranges), "state": state.path})

    def _flat(self, file: ImageFile, vcpus: Sequence[VcpuState] = (), damage: Sequence[str] = ()) -> Image:
        told = list(damage)
        memory = memory_of(file, [Range(0, 0, file.size)], told)
        return Image(file.path, self.name, memory, vcpus, damage=told, details={"regions": 0})


def _vcpus_of(tags: _Tags, damage: list[str]) -> list[VcpuState]:
    """Return the vCPUs that have CR0, CR3 and CR4. OUT damage: those that have not."""
    found = []
    for n in range(min(tags.get(("cpu:numVCPUs", ()), 0), _VCPUS_MAX)):
        block = tags.blocks.get(("CR64", (n,)), b"")
        registers = {f"cr{i}": int.from_bytes(block[8 * i:8 * i + 8], "little") for i in _CONTROL if len(block) >= 8 * i + 8}
        registers |= {f"cr{i}": tags["CR64", (n, i)] for i in _CONTROL if ("CR64", (n, i)) in tags}
        registers |= {name: tags[name, (n,)] for name in _GENERAL if (name, (n,)) in tags}
        flags = next((tags[name, (n,)] for name in ("eflags", "EFLAGS") if (name, (n,)) in tags), 2)
        if not registers.keys() >= {"cr0", "cr3", "cr4"}:
            damage.append(f"vCPU {n} has no control registers; it is left out")
            break                           # those behind it would have its number
        cr0, cr4 = registers["cr0"], registers["cr4"]
        long_mode = bool(cr0 & Cr0.PG and cr4 & Cr4.PAE) and _is_64_bit(registers, cr4)
        regs = regs_of(cr0, registers["cr3"], cr4, long_mode=long_mode, rflags=flags)
        found.append(VcpuState(n, regs, registers | {"rflags": flags}, ("efer",)))
    return found


def _is_64_bit(registers: dict[str, int], cr4: int) -> bool:
    """True if a guest with PAE runs in long mode: it has what no other guest has, or is not known to be without it."""
    wide = any(value >> 32 for name, value in registers.items() if not name.startswith("cr"))
    return wide or bool(cr4 & (Cr4.LA57 | Cr4.PCIDE)) or registers["cr3"] & 0xFFF == 0


def _tags_of(file: ImageFile, group: bytes) -> _Tags | None:
    """Return the tags of a group; None if the file does not have it."""
    header = file.item(_HEADER, 0, "the header")
    if header["magic"].tobytes() not in _MAGICS:
        raise file.fail("is no state file of VMware", 0)
    if header["groups"] > _GROUPS_MAX:
        raise file.fail(f"{header['groups']} groups; want {_GROUPS_MAX} at most", 8)
    wide = 4 if header["magic"].tobytes()[0] & 0xF == 0 else 8
    groups = file.array(_GROUP, _HEADER.itemsize, int(header["groups"]), "the groups")
    where = np.flatnonzero(groups["name"] == group)
    if not where.size:
        return None
    at = int(groups["offset"][where[0]])
    tags = _Tags()
    for _ in range(_TAGS_MAX):
        flags, length = file.bytes(at, 2, "a tag")
        if not flags and not length:
            return tags
        name = file.bytes(at + 2, length, "a tag").decode("latin-1")
        at += 2 + length
        indices = tuple(file.array(np.dtype("<u4"), at, flags >> 6, "a tag").tolist())
        at += 4 * (flags >> 6)
        size = flags & 0x3F
        if size >= 62:
            size = int.from_bytes(file.bytes(at, wide, "a tag"), "little")
            pad = int.from_bytes(file.bytes(at + 2 * wide, 2, "a tag"), "little")
            at += 2 * wide + 2 + pad
            if size <= _BLOCK_MAX:
                tags.blocks[name, indices] = file.bytes(at, size, "a block")
        elif size <= 8:
            tags[name, indices] = int.from_bytes(file.bytes(at, size, "a tag"), "little")
        at += size
    raise file.fail(f"more than {_TAGS_MAX} tags", at)


FORMAT = _Vmware()
