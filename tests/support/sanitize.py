"""Random walks over random table memory, with the extension modules built for AddressSanitizer and UBSan.

    python tests/support/sanitize.py [--walks N] [--seed S] [--tests FILE ...]

Builds into build/asan, then runs itself there, over random guests: tables that make no sense, registers, processor models,
accesses, recordings, and machines below such guests, with snapshots, clones and copies of memory. With --tests pytest runs
these there instead. A finding of a sanitizer ends the run at once with its report and a non-zero status.
"""

import argparse
import dataclasses
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
from misuse import run_misuse
from paths import ROOT
from random_guests import EDGE_GVAS, MODES, PAGE, random_accesses, random_gvas, random_memory, random_regs, random_stage

RECORDINGS = ROOT / "tests" / "data" / "linux"
SANITIZERS = "address,undefined"
RUNTIMES = ("libasan.so", "libubsan.so")
IN_CHILD = "KVMMU_SANITIZE_CHILD"

FIELDS = ("gpa", "status", "error_code", "level", "pte", "pte_gpa", "pte_access", "refs")
SOME_FIELDS = (FIELDS, FIELDS[:4], ("level",), ("pte", "refs", "gpa"), (*FIELDS, "ngpa", "fault_gpa", "exit_qualification"))
BATCHES_PER_MEMORY = 12
ROWS = (1, 2, 3, 17, 256, 2048, 8192, 8192, 20000)
REFERENCE_ROWS = 7                      # so few rows are walked one by one
SCALARS = 12
WILD_MACHINES = 20
MISUSES = 20
RECORDINGS_PER_MILLION = 40
MACHINE_ACCESSES_PER_MILLION = 300_000


def build():
    """Build with the sanitizers; return the directory to import from."""
    base = ROOT / "build" / "asan"
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", base], cwd=ROOT, check=True,
                   env=os.environ | {"KVMMU_SANITIZE": SANITIZERS})
    return base / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def run_child(command):
    """Run Python with these arguments on the sanitized modules; return its exit status."""
    compiler = os.environ.get("CC", "cc").split()
    runtimes = [subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip() for name in RUNTIMES]
    environment = os.environ | {
        IN_CHILD: "1", "PYTHONPATH": f"{build()}{os.pathsep}{ROOT / 'tests' / 'support'}", "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([sys.executable, "-P", *command], env=environment, cwd=ROOT, check=False).returncode


def check_build():
    """Refuse to run with other modules than the sanitized ones."""
    import kvmmu

    where = Path(kvmmu.__file__).resolve()
    if ROOT / "build" / "asan" not in where.parents:
        raise SystemExit(f"kvmmu was imported from {where}, which is not the sanitized build")


def run_tests(files):
    """Run tests; return their exit status."""
    import pytest

    check_build()
    return pytest.main(["-q", "-p", "no:cacheprovider", *files])


# ---- walks ----------------------------------------------------------------------------------------------------------------

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
    from kvmmu.walk.batch._kernels import instruction_sets, use_instruction_set

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
    from kvmmu.replay.replay import replay
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
    """Machines over random memory, and one driven at random whose tables are scribbled over then: only the audit checks."""
    from machine_driver import CONFIGURATIONS, Driver
    from wild_machines import wild_machine

    for _ in range(WILD_MACHINES):
        wild_machine(kvmmu, np.random.default_rng(rng.integers(1 << 63)), counts)
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

    check_build()
    counts = Counter()
    started = time.monotonic()
    number = 0
    run_misuse(SANITIZERS, MISUSES)
    counts["runs of a careless C program"] = MISUSES
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
    parser.add_argument("--tests", nargs="+", metavar="FILE")
    arguments = parser.parse_args()
    if os.environ.get(IN_CHILD):
        return run_tests(arguments.tests) if arguments.tests else campaign(arguments.walks, arguments.seed)
    print(f"building with {SANITIZERS} ...", flush=True)
    tests = ["--tests", *arguments.tests] if arguments.tests else []
    return run_child([__file__, "--walks", str(arguments.walks), "--seed", str(arguments.seed), *tests])


if __name__ == "__main__":
    sys.exit(main())
