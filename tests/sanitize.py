"""Random walks over random table memory, with the extension modules built for AddressSanitizer and UBSan.

    python tests/sanitize.py [--walks N] [--seed S]

Builds into build/asan, then runs itself there. Memory holds words that look like entries and point at tables, at
themselves, into holes and past the end; registers, processor models, access bytes and recordings are random as well. A
finding of a sanitizer ends the run at once with its report and a non-zero status.
"""

import argparse
import dataclasses
import mmap
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT / "tests" / "data" / "linux"
SANITIZERS = "address,undefined"
RUNTIMES = ("libasan.so", "libubsan.so")
IN_CHILD = "KVMMU_SANITIZE_CHILD"

PAGE = 4096
MODES = ("nopg", "32", "pae", "4l", "5l")
FIELDS = ("gpa", "status", "error_code", "level", "pte", "pte_gpa", "pte_access", "refs")
SOME_FIELDS = (FIELDS, FIELDS[:4], ("level",), ("pte", "refs", "gpa"), (*FIELDS, "ngpa", "fault_gpa", "exit_qualification"))
ACCESS_BITS = np.array([0, 2, 4, 8, 16, 32], np.uint8)
EDGE_GVAS = np.array([0, *(1 << n for n in (32, 47, 56)), *((1 << n) - 1 for n in (32, 47, 56, 64))], np.uint64)
CR0_PE, CR0_WP, CR0_PG = 1 << 0, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
EFER_LME, EFER_LMA, EFER_NX = 1 << 8, 1 << 10, 1 << 11
INDEXED_LIMIT = 1 << 32                 # slots beyond the largest that hold more than this are searched, not indexed
SPARSE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, "prot": mmap.PROT_READ}
BATCHES_PER_MEMORY = 12
ROWS = (1, 2, 3, 17, 256, 2048, 8192, 8192, 20000)
REFERENCE_ROWS = 7                      # so few rows are walked one by one
SCALARS = 12
RECORDINGS_PER_MILLION = 40
MACHINE_ACCESSES_PER_MILLION = 300_000


def build():
    """Build with the sanitizers; return the directory to import from."""
    base = ROOT / "build" / "asan"
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", base], cwd=ROOT, check=True,
                   env=os.environ | {"KVMMU_SANITIZE": SANITIZERS})
    return base / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def run_child(arguments):
    """Run this script on the sanitized modules; return its exit status."""
    compiler = os.environ.get("CC", "cc").split()
    runtimes = [subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip() for name in RUNTIMES]
    environment = os.environ | {
        IN_CHILD: "1", "PYTHONPATH": str(build()), "PYTHONMALLOC": "malloc", "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([sys.executable, "-P", __file__, *arguments], env=environment, check=False).returncode


# ---- memory -----------------------------------------------------------------------------------------------------------

def slot_buffer(rng, size, kind):
    """size bytes that end at the end of their allocation, so that the sanitizer sees the first byte beyond."""
    if kind == "unaligned":
        offset = int(rng.integers(1, 8))
        return memoryview(np.zeros(size + offset, np.uint8))[offset:].toreadonly()
    return np.zeros(size, np.uint8)


def random_layout(rng, mode):
    """[(gpa, pages, kind)]: slots that do not overlap; the first lies at 0."""
    limit = 1 << (20 if mode == "32" else 40)
    first = int(rng.choice((1, 2, 16, 200)))
    slots = [(0, first, str(rng.choice(("plain", "plain", "readonly", "unaligned"))))]
    gfn = first
    for _ in range(int(rng.integers(0, 4))):
        gfn += int(rng.choice((0, 1, 7, 1000)))
        pages = int(rng.choice((1, 3, 64)))
        slots.append((gfn * PAGE, pages, str(rng.choice(("plain", "plain", "readonly", "unaligned")))))
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


def random_memory(kvmmu, rng, mode, maxphyaddr, counts):
    """A GuestMemory, and the frames that tables may lie in."""
    slots = random_layout(rng, mode)
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


def check_scalars(kvmmu, walk, gvas, accesses, t, counts):
    """The scalar calls must agree with `t`, the array call on the same rows, which stored no A/D bits."""
    for gva, access, gpa, status, error_code in zip(
            gvas.tolist(), accesses.tolist(), t.gpa.tolist(), t.status.tolist(), t.error_code.tolist(), strict=True):
        record = walk.walk_record(gva, access)
        str(record)
        expected = (status, error_code, gpa if status == 0 else None)
        if (int(record.status), record.error_code, record.gpa) != expected:
            raise AssertionError(f"walk_record({gva:#x}, {access:#x}) is {record}, the array call said {expected}")
        try:
            scalar = (0, 0, walk.gva_to_gpa(gva, access))
        except kvmmu.PageFault as fault:
            scalar = (1, fault.error_code, None)
        except kvmmu.GeneralProtection:
            scalar = (2, 0, None)
        if scalar != expected:
            raise AssertionError(f"gva_to_gpa({gva:#x}, {access:#x}) is {scalar}, the array call said {expected}")
        counts["scalar walks"] += 2


def few_pages(rng, gvas):
    """The same number of addresses on few pages, in runs: translations that a batch remembers."""
    pages = rng.choice(gvas, int(rng.choice((1, 8, 100))))
    runs = np.repeat(rng.choice(pages, gvas.size), int(rng.choice((1, 5, 64))))[:gvas.size]
    return runs ^ rng.integers(0, PAGE, gvas.size, np.uint64)


def register_sets(kvmmu, rng, mode, frames, maxphyaddr, counts):
    """One set, or several, of this mode or of any, under second stages that some of them share."""
    number = int(rng.choice((1, 1, 2, 5, 8, 80)))
    sets = [random_regs(kvmmu, rng, mode if rng.random() < 0.8 else str(rng.choice(MODES)), frames, maxphyaddr)
            for _ in range(number)]
    if number > 1 and rng.random() < 0.5:
        stages = [random_stage(kvmmu, rng, frames, maxphyaddr) for _ in range(int(rng.choice((1, 3, number))))]
        sets = [(r, stages[int(rng.integers(len(stages)))]) for r in sets]
    if number > 5:
        counts["batches of many register sets"] += 1
    return sets


def legal_sets(kvmmu, walk, sets, counts):
    """The sets that can be loaded."""
    legal = []
    for row in sets:
        try:
            walk.prepare([row])
            legal.append(row)
        except kvmmu.GuestFault:
            counts["illegal register sets"] += 1
    return legal


def check_batch(walk, gvas, accesses, ctx, regs, fields, rng, counts):
    """A batch without stores must agree with the same rows in calls too small for more than one walk after the other."""
    how = {"regs": regs, "fields": fields, "set_ad": False}
    together = walk.translate(gvas, accesses, ctx=ctx, **how)
    start = int(rng.integers(gvas.size))
    for first in range(start, min(start + 40 * REFERENCE_ROWS, gvas.size), REFERENCE_ROWS):
        rows = slice(first, min(first + REFERENCE_ROWS, gvas.size))
        alone = walk.translate(gvas[rows], accesses[rows] if np.ndim(accesses) else accesses,
                               ctx=None if ctx is None else ctx[rows], **how)
        for name in fields:
            if not np.array_equal(getattr(together, name)[rows], getattr(alone, name)):
                raise AssertionError(f"{name} of rows {rows.start} to {rows.stop}: {getattr(together, name)[rows]} in a batch, "
                                     f"{getattr(alone, name)} alone")
    counts["batches compared"] += 1


def walk_batches(kvmmu, rng, counts):
    """Batches over one random memory."""
    mode = str(rng.choice(MODES, p=(0.02, 0.2, 0.2, 0.38, 0.2)))
    maxphyaddr = int(rng.choice((32, 36, 40, 46, 48, 52)))
    mem, frames = random_memory(kvmmu, rng, mode, maxphyaddr, counts)
    cpu = kvmmu.CpuModel(vendor=str(rng.choice(("intel", "amd"))), maxphyaddr=maxphyaddr, gbpages=bool(rng.integers(2)),
                         pse36=bool(rng.integers(2)), conformance=str(rng.choice(("sdm", "kvm"))))
    vcpu = kvmmu.Vcpu(mem, cpu=cpu)
    walk = vcpu.gva_walk
    from kvmmu._batch import instruction_sets, use_instruction_set

    for _ in range(BATCHES_PER_MEMORY):
        name = str(rng.choice(instruction_sets()))
        use_instruction_set(name)
        n = int(rng.choice(ROWS))
        gvas, accesses = random_gvas(rng, n, mode), random_accesses(rng, n)
        if rng.random() < 0.5:
            gvas = few_pages(rng, gvas)
        if rng.random() < 0.3:
            accesses[:] = accesses[0]
        options = {"fields": FIELDS if rng.random() < 0.5 else ("gpa", "status", "error_code"), "set_ad": bool(rng.integers(2)),
                   "threads": int(rng.choice((1, 1, 2)))}
        sets = legal_sets(kvmmu, walk, register_sets(kvmmu, rng, mode, frames, maxphyaddr, counts), counts)
        if not sets:
            continue
        plain = len(sets) == 1 and not isinstance(sets[0], tuple)
        if plain:
            r = sets[0]
            vcpu.set_regs(**{register: getattr(r, register) for register in ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")})
        else:
            ctx = np.repeat(rng.integers(0, len(sets), n, np.uint32), int(rng.choice((1, 10, 64))))[:n]
            options |= {"regs": walk.prepare(sets), "ctx": ctx}
            counts["walks in two stages"] += n * isinstance(sets[0], tuple)
        t = walk.translate(gvas, accesses, **options)
        counts["walks"] += n
        counts[f"walks {mode}"] += n
        counts[f"walks {name}"] += n
        counts[f"walks {cpu.conformance}"] += n
        for status, number in enumerate(np.bincount(t.status, minlength=3).tolist()):
            counts[f"status {kvmmu.Status(status).name}"] += number
        if np.any((t.status == 0) != (t.gpa != kvmmu.INVALID_GPA)) or np.any((t.status != 1) & (t.error_code != 0)):
            raise AssertionError("status, gpa and error_code do not belong together")
        if rng.random() < 0.2:
            walk.translate_span(gvas, rng.integers(1, PAGE + 1, n, np.uint64), accesses,
                                **{name: options[name] for name in ("regs", "ctx", "set_ad", "threads") if name in options})
            counts["walks of spans"] += n
        if rng.random() < 0.5:
            fields = SOME_FIELDS[int(rng.integers(len(SOME_FIELDS)))]
            check_batch(walk, gvas, accesses, options.get("ctx"), options.get("regs"), fields, rng, counts)
        if plain:
            gvas, accesses = gvas[:SCALARS], accesses[:SCALARS]
            check_scalars(kvmmu, walk, gvas, accesses, walk.translate(gvas, accesses, set_ad=False), counts)


# ---- recordings -------------------------------------------------------------------------------------------------------

def damaged_recording(kvmmu, rng, counts):
    """Open a recording of which one file was cut or changed; replay it if it passes, with its table pages changed."""
    from kvmmu.replay import replay
    from kvmmu.traces import Recording, RecordingError

    source = rng.choice([path for path in sorted(RECORDINGS.iterdir()) if path.is_dir()])
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(source, Path(scratch) / "copy")
        file = rng.choice(sorted(copy.glob("*.npz*")))
        content = bytearray(file.read_bytes())
        if rng.random() < 0.6:
            del content[int(rng.integers(len(content))):]
        else:
            for at in rng.integers(0, len(content), int(rng.integers(1, 9))):
                content[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        counts["recordings damaged"] += 1
        try:
            recording = Recording.open(copy)
        except RecordingError:
            counts["recordings refused"] += 1
            return
    data = recording.table_data.copy()
    words = data.reshape(-1).view(np.uint64)
    chosen = rng.integers(0, words.size, words.size // 50)
    words[chosen] ^= np.uint64(1) << rng.integers(0, 64, chosen.size, np.uint64)
    mangled = dataclasses.replace(recording, table_data=data)
    try:
        report = replay(mangled)
    except (RecordingError, kvmmu.GeneralProtection):
        counts["replays refused"] += 1
        return
    counts["replays of changed tables"] += 1
    counts["accesses replayed"] += report.accesses
    counts["mismatches seen"] += report.mismatches


def damaged_trace(kvmmu, rng, counts):
    """Replay a recording as a trace in memory, with words, registers and events of it changed, moved and doubled."""
    from kvmmu.traces import Recording, Trace, TraceError
    from kvmmu.traces.conversion import recording_chunks, recording_header

    source = rng.choice([path for path in sorted(RECORDINGS.iterdir()) if path.is_dir()])
    recording = Recording.open(source)
    chunks = [dict(chunk) for chunk in recording_chunks(recording)][:4]
    for chunk in chunks:
        rows = chunk["op"].size
        if rows < 2 or rng.random() < 0.5:
            continue
        chosen = rng.integers(0, rows, int(rng.integers(1, 4)))
        name = rng.choice(sorted(chunk))
        damaged = chunk[name].copy()
        kind = rng.random()
        if kind < 0.5:
            damaged[chosen] ^= np.left_shift(1, rng.integers(0, 8 * damaged.itemsize, chosen.size)).astype(damaged.dtype)
        elif kind < 0.8:
            damaged[chosen] = damaged[rng.integers(0, rows, chosen.size)]
        chunk[name] = damaged
        if kind > 0.6:                          # whole rows somewhere else
            order = np.arange(rows)
            order[chosen] = order[rng.integers(0, rows, chosen.size)]
            for column in chunk:
                chunk[column] = chunk[column][order]
    counts["traces damaged"] += 1
    try:
        report = kvmmu.replay(Trace(recording_header(recording), chunks))
    except TraceError as error:
        counts["traces refused or ended early"] += 1
        report = error.report
    counts["accesses replayed"] += report.accesses
    counts["mismatches seen"] += report.mismatches


def random_machine(kvmmu, rng, counts):
    """A machine driven at random, then with tables that are scribbled over: nothing but the audit is checked."""
    from machine_driver import CONFIGURATIONS, Driver

    host = CONFIGURATIONS[str(rng.choice(sorted(CONFIGURATIONS)))]
    driver = Driver(host, str(rng.choice(("4l", "5l", "pae", "32"))), int(rng.integers(1 << 31)))
    for _ in range(int(rng.integers(20, 200))):
        driver.step()
    tables = np.array(sorted({gpa & ~(PAGE - 1) for gpa in (*driver.ptes, *driver.upper, driver.cr3)}), np.uint64)
    for _ in range(30):
        masks = rng.choice(np.array([2**64 - 1, 0xFFF, 0x7FFFFFFF, 0x1FFFFFF], np.uint64), 8)
        words = rng.integers(0, 1 << 63, 8, np.uint64) & masks
        for gpa, word in zip(rng.choice(tables, 8), words | rng.choice(np.array([0, 1, 3, 7, 0x87], np.uint64), 8), strict=True):
            driver.mem.write_u64(int(gpa) + 8 * int(rng.integers(512)), int(word))
        gva = np.concatenate([rng.integers(0, 1 << 48, 50, np.uint64), rng.choice(driver.rows, 50), EDGE_GVAS])
        driver.vcpu.access(gva, rng.choice(np.array([0, 2, 4, 6, 16, 20, 32], np.uint8), gva.size))
        counts["machine accesses"] += gva.size
    assert driver.vm.audit() == []
    counts["machine operations"] += driver.steps


def campaign(walks, seed):
    """Run until so many walks are done; print what was done."""
    import kvmmu

    sys.path.append(str(ROOT / "tests"))
    where = Path(kvmmu.__file__).resolve()
    if ROOT / "build" / "asan" not in where.parents:
        raise SystemExit(f"kvmmu was imported from {where}, which is not the sanitized build")
    counts = Counter()
    started = time.monotonic()
    number = 0
    while counts["walks"] < walks:
        try:
            walk_batches(kvmmu, np.random.default_rng((seed, number)), counts)
            if counts["machine accesses"] < counts["walks"] * MACHINE_ACCESSES_PER_MILLION / 1e6:
                random_machine(kvmmu, np.random.default_rng((seed, number, 2)), counts)
            if counts["recordings damaged"] < counts["walks"] * RECORDINGS_PER_MILLION / 1e6:
                damaged_recording(kvmmu, np.random.default_rng((seed, number, 1)), counts)
                damaged_trace(kvmmu, np.random.default_rng((seed, number, 2)), counts)
        except BaseException as error:
            error.add_note(f"in round {number} of seed {seed}")
            raise
        number += 1
        if number % 100 == 0:
            print(f"  {counts['walks']:,} walks, {time.monotonic() - started:.0f} s", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:>14,} {name}")
    print(f"sanitizers ({SANITIZERS}): clean after {counts['walks']:,} array walks and {counts['scalar walks']:,} scalar walks, "
          f"seed {seed}, {time.monotonic() - started:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walks", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    if os.environ.get(IN_CHILD):
        return campaign(arguments.walks, arguments.seed)
    print(f"building with {SANITIZERS} ...", flush=True)
    return run_child(["--walks", str(arguments.walks), "--seed", str(arguments.seed)])


if __name__ == "__main__":
    sys.exit(main())
