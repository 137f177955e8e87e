"""Time to open a memory image of each format, and to list everything that page tables map."""

import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK

import kvmmu
from kvmmu import CpuModel, GuestMemory, Regs, Vcpu, open_image

PAGE = 4096
LEAVES = 1 << (16 if QUICK else 20)
PAGES = 1 << (12 if QUICK else 16)                  # of image files
REGS = Regs(cr0=0x80010033, cr3=0x1000, cr4=0x20, efer=0xD00)
KERNEL_HALF = 0xFFFF_8000_0000_0000
SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "images" / "linux-l4.ptonly.elf.zst"     # tables of a Debian guest
TAKE = "numpy: read every leaf, keep those present"


def long_mode(entries, leaf_tables):
    """A guest whose `leaf_tables` page tables have these leaves, under as many page directories as it takes."""
    directories = -(-leaf_tables // 512)
    words = np.zeros((3 + directories + leaf_tables, 512), np.uint64)
    base = 0x1000
    words[0, 0] = base + PAGE | 7
    words[1, :directories] = base + (2 + np.arange(directories, dtype=np.uint64)) * PAGE | np.uint64(7)
    places = base + (2 + directories + np.arange(leaf_tables, dtype=np.uint64)) * np.uint64(PAGE) | np.uint64(7)
    words[2:2 + directories].reshape(-1)[:leaf_tables] = places
    words[2 + directories:2 + directories + leaf_tables] = entries
    mem = GuestMemory(base + words.nbytes)
    mem.write(base, words.tobytes())
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=52))
    vcpu.set_regs(REGS)
    return vcpu.gva_walk, words[2 + directories:2 + directories + leaf_tables]


@pytest.mark.parametrize("merge", [False, True], ids=["page by page", "joined"])
def bench_mappings(race, rng, merge):
    """Every leaf of a full address space in no order: ns for each of them is 1000 / (millions a second)."""
    tables = LEAVES // 512
    frames = rng.permutation(LEAVES).astype(np.uint64).reshape(tables, 512)
    walk, leaves = long_mode(frames << np.uint64(12) | np.uint64(0x67), tables)

    def take(_):
        flat = leaves.reshape(-1)
        return flat[(flat & np.uint64(1)) != 0] & np.uint64(0xFFFFFFFFFF000)

    def check(_):
        found = walk.mappings(merge=False)
        assert len(found) == LEAVES
        assert (found.gpa == frames.reshape(-1) << np.uint64(12)).all()

    race("Mappings", f"{LEAVES:,} leaves, {'joined' if merge else 'page by page'}", TAKE, lambda _: walk.mappings(merge=merge),
         take, lambda: (None,), rows=LEAVES, check=check)


def bench_shared_tables(race, rng):
    """One page table that 65,536 entries of page directories point to: what is there once is read once for each place."""
    shared = 1 << (10 if QUICK else 16)
    entry = (np.arange(512, dtype=np.uint64) << np.uint64(12)) | np.uint64(0x67)
    directories = shared // 512
    words = np.zeros((3 + directories, 512), np.uint64)
    words[0, 0] = 0x2000 | 7
    words[1, :directories] = 0x4000 + np.arange(directories, dtype=np.uint64) * PAGE | np.uint64(7)
    words[2] = entry
    words[3:] = 0x3000 | 7
    mem = GuestMemory(0x1000 + words.nbytes)
    mem.write(0x1000, words.tobytes())
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=52))
    vcpu.set_regs(REGS)

    def check(_):
        assert len(vcpu.gva_walk.mappings()) == shared
        assert int(vcpu.gva_walk.mappings().size.sum()) == shared * 512 * PAGE

    race("Mappings", f"a table in {shared:,} places, joined", "numpy: the same rows, made", lambda _: vcpu.gva_walk.mappings(),
         lambda _: np.tile(entry, shared) & np.uint64(0xFFFFFFFFFF000), lambda: (None,), rows=shared * 512, check=check, rounds=3)


def bench_kernel_half(race, skipped, tmp_path):
    """All leaves of the kernel half of a Linux guest's dump, beside the layers of volatility3 over the same file.

    volatility3 passes over tables in which all entries are the same, as those of the kernel's ESPFIX area, which has 65,536
    of the 73,607 leaves; what it finds kvmmu has to find.
    """
    case, against = "the kernel half of a Linux guest's dump, page by page", "volatility3's Intel32e layer: mapping()"
    try:
        import zstandard
        from volatility3.framework import contexts
        from volatility3.framework.layers import elf as elf_layers
        from volatility3.framework.layers import intel, physical
    except ImportError as error:
        skipped("Mappings", case, against, f"{error} (extra bench)")
    path = tmp_path / "guest.elf"
    with SAMPLE.open("rb") as packed, path.open("wb") as file:
        zstandard.ZstdDecompressor().copy_stream(packed, file)
    vcpu = open_image(path).vcpu()
    context = contexts.Context()
    for name, value in (("file.location", path.as_uri()), ("core.base_layer", "file"), ("layer.memory_layer", "core"),
                        ("layer.page_map_offset", vcpu.regs.cr3)):
        context.config[name] = value
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.add_layer(elf_layers.Elf64Layer(context, "core", "core"))
    layer = intel.Intel32e(context, "layer", "layer")
    first = KERNEL_HALF & layer.maximum_address

    def theirs(_):
        return list(layer.mapping(first, layer.maximum_address + 1 - first, ignore_errors=True))

    def check(_):
        found = vcpu.gva_walk.mappings(KERNEL_HALF, merge=False)
        assert len(found) == 73_607
        pages = dict(zip((found.gva >> np.uint64(12)).tolist(), (found.gpa >> np.uint64(12)).tolist(), strict=True))
        rows = theirs(None)
        assert sum(row[1] for row in rows) == 219_324_416
        for offset, size, gpa, *_ in rows:
            page = (offset | ~layer.maximum_address & 0xFFFF_FFFF_FFFF_FFFF) >> 12
            for n in range(size >> 12):
                if page + n in pages:                   # else within a page of 2M
                    assert pages[page + n] == (gpa >> 12) + n

    race("Mappings", case, against, lambda _: vcpu.gva_walk.mappings(KERNEL_HALF, merge=False), theirs, lambda: (None,),
         rows=73_607, check=check, rounds=5, gain=True, theirs_rows=8_067)


# ---- openers -------------------------------------------------------------------------------------------------------------

def raw(data):
    return data


def lime(data):
    """Runs of 16 pages, a page between each and the next that the guest does not have."""
    out = []
    for at in range(0, len(data), 16 * PAGE):
        part = data[at:at + 16 * PAGE]
        gpa = at // (16 * PAGE) * 17 * PAGE
        out.append(struct.pack("<IIQQQ", 0x4C694D45, 1, gpa, gpa + len(part) - 1, 0) + part)
    return b"".join(out)


def elf(data):
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 0, PAGE, 0, 0, len(data), len(data), 0).ljust(PAGE - 64, b"\0") + data


@pytest.mark.parametrize("make", [raw, lime, elf], ids=lambda make: make.__name__)
def bench_open(race, rng, tmp_path, make):
    """Open a file and read a word of it, beside reading the file: an image is mapped, and read where somebody looks."""
    path = tmp_path / f"image.{make.__name__}"
    path.write_bytes(make(rng.integers(1, 256, PAGES * PAGE, np.uint8).tobytes()))

    def check(_):
        image = open_image(path)
        assert image.format == make.__name__
        assert sum(size for _, size, _ in image.memory.slots) == PAGES * PAGE

    race("Images", f"open {PAGES * PAGE >> 20} MiB of {make.__name__}", "read the file",
         lambda _: open_image(path).memory.read_u64(0), lambda _: path.read_bytes(), lambda: (None,), rows=PAGES, check=check,
         wall=True)


# ---- copies --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first", [True, False], ids=["first", "copy of a copy"])
def bench_copy(race, rng, first):
    """`GuestMemory.copy()` of memory that was all written, and of such a copy in which 64 pages were changed."""
    mem = GuestMemory(PAGES * PAGE)
    mem.write(0, rng.integers(0, 256, PAGES * PAGE, np.uint8).tobytes())
    whole = np.frombuffer(mem.read(0, PAGES * PAGE), np.uint8)
    if not first:
        mem = mem.copy()
        for page in rng.choice(PAGES, 64, replace=False).tolist():
            mem.write_u64(page * PAGE, 1)

    def check(_):
        assert mem.copy().read(0, PAGES * PAGE) == mem.read(0, PAGES * PAGE)

    race("Copies", f"{PAGES * PAGE >> 20} MiB, {'first copy' if first else 'copy of a copy'}", "numpy: copy the bytes",
         lambda _: mem.copy(), lambda _: whole.copy(), lambda: (None,), rows=PAGES, check=check, wall=True)


@pytest.mark.parametrize("tdp", ["ept", None], ids=["EPT", "shadow paging"])
def bench_snapshot(race, rng, tdp):
    """`snapshot()` and `restore()` of a machine that has mapped 16,384 pages, beside making all of that anew."""
    pages = 1 << (10 if QUICK else 14)
    mem = GuestMemory((pages + 4096) * PAGE)
    tables = kvmmu.PageTables(mem)
    gvas = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(0x400000)
    tables.map(gvas, gvas - np.uint64(0x400000))
    vm = kvmmu.Vm(mem, host=kvmmu.Host(tdp=tdp), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(tables.regs())
    vcpu.access(gvas, kvmmu.Access.WRITE)

    def again(_):
        vm.zap_all()
        vcpu.access(gvas, kvmmu.Access.WRITE)

    def save(_):
        vm.restore(vm.snapshot())

    race("Copies", f"{pages:,} pages mapped, {tdp or 'shadow paging'}: snapshot, restore", "fault all pages in again", save,
         again, lambda: (None,), rows=pages, rounds=3)
