# SPDX-License-Identifier: Apache-2.0
"""Random guests: memory with words that look like entries, registers, second stages, and addresses to walk.

Entries point at tables, at themselves, into holes and past the end.
"""

import mmap

import numpy as np
from builders import mode_regs
from machines import NXE, PKE, SMAP, SMEP, WP

PAGE = 4096
MODES = ("nopg", "32", "pae", "4l", "5l")
ACCESS_BITS = np.array([0, 2, 4, 8, 16, 32], np.uint8)
EDGE_GVAS = np.array([0, *(1 << n for n in (32, 47, 56)), *((1 << n) - 1 for n in (32, 47, 56, 64))], np.uint64)
CR0_PE, CR0_WP, CR0_PG = 1 << 0, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
EFER_LME, EFER_LMA, EFER_NX = 1 << 8, 1 << 10, 1 << 11
INDEXED_LIMIT = 1 << 32                 # slots beyond the largest that hold more than this are searched, not indexed
KINDS = ("plain", "plain", "readonly", "unaligned")
SPARSE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, "prot": mmap.PROT_READ}


# ---- memory -----------------------------------------------------------------------------------------------------------

def slot_buffer(rng, size, kind):
    """size bytes that end at the end of their allocation, so that the sanitizer sees the first byte beyond."""
    if kind == "unaligned":
        offset = int(rng.integers(1, 8))
        return memoryview(np.zeros(size + offset, np.uint8))[offset:].toreadonly()
    return np.zeros(size, np.uint8)


def random_layout(rng, mode, kinds):
    """[(gpa, pages, kind)]: slots that do not overlap; the first lies at 0."""
    limit = 1 << (20 if mode == "32" else 40)
    first = int(rng.choice((1, 2, 16, 200)))
    slots = [(0, first, str(rng.choice(kinds)))]
    gfn = first
    for _ in range(int(rng.integers(0, 4))):
        gfn += int(rng.choice((0, 1, 7, 1000)))
        pages = int(rng.choice((1, 3, 64)))
        slots.append((gfn * PAGE, pages, str(rng.choice(kinds))))
        gfn += pages
    if rng.random() < 0.5:              # the last pages of the address space
        slots.append(((limit - 2) * PAGE, 2, "plain"))
    return slots


def frames_of(slots):
    """The page numbers of all slots."""
    return np.concatenate([np.arange(gpa // PAGE, gpa // PAGE + pages, dtype=np.uint64) for gpa, pages, _ in slots])


def entries(rng, n, mode, slots, maxphyaddr):
    """n words of table memory, most of them plausible entries."""
    frames = frames_of(slots)
    edges = np.array([gpa // PAGE + pages for gpa, pages, _ in slots] + [(1 << (maxphyaddr - 12)) - 1], np.uint64)
    target = np.where(rng.random(n) < 0.9, rng.choice(frames, n), rng.choice(edges, n))
    wild = rng.random(n) < 0.05
    target[wild] = rng.integers(0, 1 << (20 if mode == "32" else 40), int(wild.sum()), np.uint64)
    word = target << np.uint64(12)
    probabilities = {0: 0.93, 1: 0.8, 2: 0.8, 5: 0.5, 6: 0.4, 7: 0.08, 8: 0.1, 12: 0.02, 13: 0.02, 21: 0.02}
    if mode != "32":
        probabilities |= {51: 0.01, 52: 0.02, 59: 0.1, 60: 0.1, 62: 0.05, 63: 0.05}
        if mode == "pae":
            probabilities |= dict.fromkeys((52, 59, 60, 62), 0.005)
    for bit, probability in probabilities.items():
        chosen = rng.random(n) < probability
        word[chosen] |= np.uint64(1 << bit)
    noise = rng.random(n) < 0.02
    word[noise] = rng.integers(0, 1 << 64, int(noise.sum()), np.uint64)
    word[rng.random(n) < 0.03] = 0
    return word.astype(np.uint32) if mode == "32" else word


def slot_content(rng, gpa, size, mode, slots, maxphyaddr):
    """Random bytes for one slot; some tables point to themselves."""
    if mode == "32":
        return entries(rng, size // 4, mode, slots, maxphyaddr).view(np.uint8)
    words = entries(rng, size // 8, mode, slots, maxphyaddr)
    at = rng.integers(0, words.size, 8, np.uint64)
    words[at] = (np.uint64(gpa) + at * np.uint64(8)) & ~np.uint64(PAGE - 1) | np.uint64(0x67)
    return words.view(np.uint8)


def random_memory(kvmmu, rng, mode, maxphyaddr, counts, kinds=KINDS):
    """A GuestMemory, and the frames that tables may lie in."""
    slots = random_layout(rng, mode, kinds)
    mem = None
    for gpa, pages, kind in slots:
        buffer = slot_buffer(rng, pages * PAGE, kind)
        content = slot_content(rng, gpa, pages * PAGE, mode, slots, maxphyaddr)
        target = np.frombuffer(buffer.obj, np.uint8)[-content.size:] if kind == "unaligned" else buffer
        target[:] = content
        if mem is None:
            if kind == "readonly":
                buffer = memoryview(buffer).toreadonly()
            mem = kvmmu.GuestMemory(buffer)
        else:
            mem.add_slot(gpa, buffer, readonly=kind == "readonly")
        counts[f"slots {kind}"] += 1
    if mode != "32" and rng.random() < 0.02:        # too much to index: look-ups search
        for gpa in (1 << 46, 1 << 47):
            mem.add_slot(gpa, mmap.mmap(-1, INDEXED_LIMIT + PAGE, **SPARSE))
        counts["memories searched"] += 1
    if rng.random() < 0.1:                          # the same pages, each copied out of the slots
        gpas = rng.permutation(frames_of(slots) * np.uint64(PAGE))
        gpas = gpas[:max(1, gpas.size * 3 // 4)]
        contents = np.stack([np.frombuffer(mem.read(int(gpa), PAGE), np.uint8) for gpa in gpas])
        mem = kvmmu.GuestMemory.from_pages(gpas, contents)
        counts["memories of pages"] += 1
    counts["memories"] += 1
    return mem, frames_of(slots)


# ---- registers and rows -----------------------------------------------------------------------------------------------

def random_regs(kvmmu, rng, mode, frames, maxphyaddr):
    """One set of registers for this mode; not always a legal one."""
    def maybe(bit):
        return bit if rng.random() < 0.5 else 0

    last = (1 << (min(maxphyaddr, 32 if mode in ("32", "pae") else 52) - 12)) - 1
    roots = (int(rng.choice(frames)), int(frames[-1]) + 1, last)
    cr3 = roots[int(rng.choice(3, p=(0.96, 0.02, 0.02)))] * PAGE + (int(rng.integers(128)) * 32 if mode == "pae" else 0)
    cr0, cr4, efer = CR0_PE | 0x10 | maybe(CR0_WP), maybe(CR4_SMEP) | maybe(CR4_SMAP), maybe(EFER_NX)
    pdptrs = None
    if mode != "nopg":
        cr0 |= CR0_PG
    if mode == "32":
        cr4 |= maybe(CR4_PSE)
    elif mode != "nopg":
        cr4 |= CR4_PAE
    if mode in ("4l", "5l"):
        efer |= EFER_LME | EFER_LMA
        cr4 |= maybe(CR4_PKE) | (CR4_LA57 if mode == "5l" else 0)
    elif mode == "pae" and rng.random() < 0.8:
        pdptrs = tuple((int(frame) * PAGE | 1) & ((1 << maxphyaddr) - 1) for frame in rng.choice(frames, 4))
    return kvmmu.Regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=int(rng.integers(1 << 32)), pdptrs=pdptrs)


def random_stage(kvmmu, rng, frames, maxphyaddr):
    """A second stage, EPT or NPT, over the same random tables."""
    root = int(rng.choice(frames)) * PAGE & ((1 << maxphyaddr) - 1)
    if rng.random() < 0.5:
        ad = bool(rng.integers(2))
        pml = None
        if ad and rng.random() < 0.5:
            pml = kvmmu.Pml(int(rng.choice(frames)) * PAGE, int(rng.choice((0, 1, 511, 0xFFFF))))
        return kvmmu.Ept(root | 6 | int(rng.choice((3, 4))) << 3 | ad << 6, mbec=bool(rng.integers(2)),
                         execonly=bool(rng.integers(2)), advanced_info=bool(rng.integers(2)), pml=pml)
    cr4, efer = ((0x20, 0xD00), (0x1020, 0xD00), (0x20, 0x800), (0x10, 0))[int(rng.integers(4))]
    return kvmmu.Npt(root | int(rng.choice((0, 0x20, 0xFE0))), cr4=cr4, efer=efer, gmet=bool(rng.integers(2)))


def random_gvas(rng, n, mode):
    """Linear addresses: canonical ones, addresses next to each other, the ends of the space, and anything."""
    gvas = rng.integers(0, 1 << 64, n, np.uint64)
    shift = {"nopg": 32, "32": 32, "pae": 32, "4l": 16, "5l": 7}[mode]
    form = rng.random(n)
    canonical = form < 0.85
    if mode in ("4l", "5l"):
        gvas[canonical] = ((gvas << np.uint64(shift)).view(np.int64) >> shift).view(np.uint64)[canonical]
    else:
        gvas[canonical] >>= np.uint64(shift)
    close = form > 0.95
    gvas[close] = np.uint64(int(gvas[0])) ^ rng.integers(0, 1 << 14, int(close.sum()), np.uint64)
    edge = (form > 0.94) & (form <= 0.95)
    gvas[edge] = rng.choice(EDGE_GVAS, int(edge.sum()))
    return gvas


def random_accesses(rng, n):
    return np.bitwise_or.reduce(ACCESS_BITS[rng.integers(0, ACCESS_BITS.size, (3, n))], axis=0)


def random_registers(rng, mode, cr3):
    """The mode's registers with every control at random."""
    regs = mode_regs(mode, cr3)
    bit = rng.integers(0, 2, 7).tolist()
    regs["cr0"] ^= WP * bit[0]
    regs["cr4"] ^= SMEP * bit[1] | SMAP * bit[2] | PKE * bit[3] | (1 << 4) * bit[4]
    regs["efer"] ^= NXE * bit[5]
    regs["cr3"] |= 0x18 * bit[6] if mode != "pae" else 0
    regs["pkru"] = int(rng.integers(0, 1 << 32))
    return regs
