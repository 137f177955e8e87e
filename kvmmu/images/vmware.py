"""Memory of VMware's machines: a .vmem file, and the .vmss (suspended) or .vmsn (snapshot) beside it, which says where pages lie.

The second file has groups of tags: flags u8, length of the name u8, name, indices u32, data. Bits 7:6 of the flags are the number
of indices, bits 5:0 the size of the data; 62 and 63 say that their size follows. The group "memory" has regionsCount, and for
each region regionPPN (where it lies in memory), regionPageNum (in the file) and regionSize, in pages. Without the second file
the offset is the address.
"""

from os import PathLike
from pathlib import Path

import numpy as np

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.images._file import ImageFile, Range, joined, memory_of
from kvmmu.images.image import Image

__all__ = ["FORMAT"]

_PAGE = int(PAGE_SIZE)
_MAGICS = (b"\xd0\xbe\xd2\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xbe\xd2\xbe", b"\xd3\xbe\xd3\xbe")
_HEADER = np.dtype([("magic", "V4"), ("unknown", "<u4"), ("groups", "<u4")])
_GROUP = np.dtype([("name", "S64"), ("offset", "<u8"), ("unknown", "<u8")])
_GROUPS_MAX, _TAGS_MAX = 1 << 12, 1 << 20
_STATES = (".vmss", ".vmsn")


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
        tags = _memory_tags(state)
        count = tags.get(("regionsCount", ()), 0)
        if not count:
            return self._flat(file)
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
        return Image(file.path, self.name, memory_of(file, joined(ranges, damage), damage), damage=damage,
                     details={"regions": len(ranges), "state": state.path})

    def _flat(self, file: ImageFile) -> Image:
        damage: list[str] = []
        memory = memory_of(file, [Range(0, 0, file.size)], damage)
        return Image(file.path, self.name, memory, damage=damage, details={"regions": 0})


def _memory_tags(file: ImageFile) -> dict[tuple[str, tuple[int, ...]], int]:
    """Return the numbers of the group "memory", by name and indices."""
    header = file.item(_HEADER, 0, "the header")
    if header["magic"].tobytes() not in _MAGICS:
        raise file.fail("is no state file of VMware", 0)
    if header["groups"] > _GROUPS_MAX:
        raise file.fail(f"{header['groups']} groups; want {_GROUPS_MAX} at most", 8)
    wide = 4 if header["magic"].tobytes()[0] & 0xF == 0 else 8
    groups = file.array(_GROUP, _HEADER.itemsize, int(header["groups"]), "the groups")
    where = np.flatnonzero(groups["name"] == b"memory")
    if not where.size:
        raise file.fail("there is no group of tags 'memory'", _HEADER.itemsize)
    at = int(groups["offset"][where[0]])
    tags: dict[tuple[str, tuple[int, ...]], int] = {}
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
            at += 2 * wide + 2
        elif size <= 8:
            tags[name, indices] = int.from_bytes(file.bytes(at, size, "a tag"), "little")
        at += size
    raise file.fail(f"more than {_TAGS_MAX} tags", at)


FORMAT = _Vmware()
