"""Threads over shared memory and shared machines, with the extension modules built for ThreadSanitizer.

    python tests/support/thread_sanitize.py [--walks N] [--operations N] [--seed S]

Builds into build/tsan, then runs itself there: batches and scalar walks of several threads over the same tables, with updates
of accessed and dirty bits, while another thread writes the entries; machines of two vCPUs in threads of their own, while a third
thread flushes, loads registers, invalidates, and adds, moves and removes slots; a C program whose threads use the vCPUs of each
other. CPython and NumPy are not built for it: the run
sees their locks, and memory that they copy. A finding ends the run at once with its report and a non-zero status.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import sysconfig
import threading
import time

import numpy as np
from misuse import run_misuse
from paths import ROOT

IN_CHILD = "KVMMU_THREAD_SANITIZE_CHILD"
PAGE = 4096
PAGES = 256
ROUND = 4096                            # rows of a batch
MISUSES = 5                             # runs of a careless C program


def build():
    """Build with the sanitizer; return the directory to import from."""
    base = ROOT / "build" / "tsan"
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", base], cwd=ROOT, check=True,
                   env=os.environ | {"KVMMU_SANITIZE": "thread"})
    return base / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def run_child(arguments):
    """Run this script on the sanitized modules; return its exit status."""
    compiler = [word for word in os.environ.get("CC", "cc").split() if word != "ccache"]
    runtime = subprocess.check_output([*compiler, "-print-file-name=libtsan.so"], text=True).strip()
    environment = os.environ | {
        IN_CHILD: "1", "PYTHONPATH": f"{build()}{os.pathsep}{ROOT / 'tests' / 'support'}", "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": runtime,
        "KVMMU_INSTRUCTION_SET": "portable",            # C has no word for a vector load each of whose parts is atomic
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 history_size=4"}
    return subprocess.run([sys.executable, "-P", __file__, *arguments], env=environment, check=False).returncode


# ---- guests --------------------------------------------------------------------------------------------------------------

def fill_tables(mem):
    """Tables of every format that map pages 0 to 255 to 1M: 4-level at 0x1000, 32-bit at 0x6000, PAE at 0x8000, EPT at 0xB000."""
    first = np.arange(PAGES, dtype=np.uint64) << np.uint64(12)
    for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x6000, 0x7007), (0x8000, 0x9001), (0x9000, 0xA007),
                      (0xB000, 0xC007), (0xC000, 0xD007)):
        mem.write_u64(at, entry)
    for at, dtype in ((0x4000, np.uint64), (0x7000, np.uint32), (0xA000, np.uint64)):
        mem.write(at, (first + np.uint64((1 << 20) | 7)).astype(dtype).tobytes())
    for gib in range(4):
        mem.write_u64(0xD000 + 8 * gib, gib << 21 | 0xB7)


MODES = {"4-level": {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00},
         "32-bit": {"cr0": 0x80010001, "cr3": 0x6000, "cr4": 0, "efer": 0},
         "PAE": {"cr0": 0x80010001, "cr3": 0x8000, "cr4": 0x20, "efer": 0}}
LEAVES = {"4-level": (0x4000, 8), "32-bit": (0x7000, 4), "PAE": (0xA000, 8)}


def run_together(workers, enough):
    """Threads until `enough()`; the error of any ends all of them."""
    stop, errors = threading.Event(), []

    def guard(worker):
        try:
            while not stop.is_set():
                worker()
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=guard, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    while not stop.is_set() and not enough():
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def shared_walks(kvmmu, rng, mode, walks):
    """Walk the same tables in threads, by batches of two threads, by batches and by scalar calls; one more writes entries."""
    mem = kvmmu.GuestMemory(1 << 24)
    fill_tables(mem)
    counts = [0, 0, 0, 0]
    vcpus = [kvmmu.Vcpu(mem) for _ in range(4)]
    for vcpu in vcpus[:3]:
        vcpu.set_regs(**MODES[mode])
        if mode == "4-level" and vcpu is vcpus[1]:
            vcpu.enter_nested(kvmmu.Ept(0xB000 | 0x5E))
    vcpus[3].set_regs(cr0=1)
    gva = rng.integers(0, PAGES * PAGE, ROUND, np.uint64)
    access = rng.choice(np.array([0, 2, 4, 6], np.uint8), ROUND)
    base, size = LEAVES[mode]
    generators = [np.random.default_rng(int(seed)) for seed in rng.integers(1 << 32, size=4)]

    def batches(i, threads):
        t = vcpus[i].gva_walk.translate(gva, access, threads=threads)
        ok = t.status == 0
        if not (t.gpa[ok] == gva[ok] + np.uint64(1 << 20)).all():
            raise AssertionError(f"{mode}: a batch ended at {t.gpa[ok]}")
        counts[i] += ROUND * threads

    def scalars():
        for address in gva[:200].tolist():
            with contextlib.suppress(kvmmu.PageFault):
                vcpus[2].gva_walk.gva_to_gpa(address, 2)
            counts[2] += 1

    def writer():
        for page in generators[3].integers(PAGES, size=50).tolist():
            entry = (1 << 20) + page * PAGE | (0 if generators[3].random() < 0.2 else 7)
            vcpus[3].store(base + page * size, entry.to_bytes(size, "little"))
            counts[3] += 1

    run_together([lambda: batches(0, 2), lambda: batches(1, 1), scalars, writer], lambda: sum(counts[:3]) >= walks)
    return sum(counts[:3])


def shared_machine(kvmmu, rng, host, operations):
    """Two vCPUs run in threads of their own, while a third thread does what guest and host do beside them."""
    mem = kvmmu.GuestMemory(1 << 24)
    fill_tables(mem)
    vm = kvmmu.Vm(mem, host=host, backing="4k")
    vcpus = [vm.create_vcpu() for _ in range(2)]
    for vcpu in vcpus:
        vcpu.set_regs(**MODES["4-level"])
    gva = rng.integers(0, PAGES * PAGE, ROUND, np.uint64)
    access = rng.choice(np.array([0, 2, 4, 6], np.uint8), ROUND)
    walk = kvmmu.Vcpu(mem).gva_walk
    done = [0]
    stage = {"ept": kvmmu.Ept(0xB000 | 0x5E), "npt": None, None: None}[host.tdp]

    def slots():
        vm.add_slot(1 << 32, PAGE)
        vm.move_slot(1 << 32, 1 << 33)
        vm.mem.add_slot(1 << 34, PAGE)
        vm.delete_slot(1 << 33)
        vm.mem.remove_slot(1 << 34)

    def nested():
        vcpus[0].enter_nested(stage)
        vcpus[0].leave_nested()

    def trace():
        vm.trace = kvmmu.Tracepoints(capacity=64)
        vm.trace.events()
        vm.trace = None

    def log():
        vm.set_dirty_log(0, True)
        vm.get_dirty_log(0)
        vm.set_dirty_log(0, False)

    def vcpu_comes_and_goes():
        one = vm.create_vcpu()
        one.set_regs(**MODES["PAE"])
        one.access(gva[:16])
        vm.vcpus.remove(one)

    calls = (slots, nested, trace, log, vcpu_comes_and_goes, lambda: vcpus[0].invpcid(2), lambda: vcpus[1].invlpg(0x5000),
             vcpus[0].tlb.flush, lambda: vcpus[1].mov_cr(3, 0x1000), lambda: vcpus[0].set_regs(**MODES["4-level"]),
             lambda: vm.invalidate(1 << 20, 8 * PAGE), lambda: vm.age(0, 1 << 20), vm.zap_all, lambda: vm.stats, vm.clear_stats,
             lambda: vcpus[1].store(0x3000, b"12345678"), lambda: vm.split_huge_pages(0, 1 << 24), vm.sptes,
             lambda: walk.translate(gva, threads=2), lambda: len(vcpus[0].tlb), lambda: vm.set_nr_mmu_pages(64))

    def beside():
        calls[int(rng.integers(len(calls)))]()
        done[0] += 1

    run_together([lambda: vcpus[0].access(gva, access), lambda: vcpus[1].access(gva, access), beside],
                 lambda: done[0] >= operations)
    wrong = vm.audit()
    if wrong or vm.stats["bugs"]:
        raise AssertionError(f"{host}: {wrong[:3]} {vm.stats['bugs']} bugs")
    return done[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walks", type=int, default=1_000_000)
    parser.add_argument("--operations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if not os.environ.get(IN_CHILD):
        return run_child(sys.argv[1:])

    import kvmmu
    from kvmmu.walk.batch._job import set_rows_of_thread
    set_rows_of_thread(1)

    run_misuse("thread", MISUSES)
    rng, begin, walks, operations = np.random.default_rng(options.seed), time.time(), 0, 0
    for mode in MODES:
        walks += shared_walks(kvmmu, rng, mode, options.walks // len(MODES))
        print(f"{mode}: {walks} walks, {time.time() - begin:.0f} s", flush=True)
    hosts = (kvmmu.Host(tdp="ept", pml=True), kvmmu.Host(tdp="npt", maxphyaddr=46), kvmmu.Host(tdp=None, maxphyaddr=46))
    for host in hosts:
        operations += shared_machine(kvmmu, rng, host, options.operations // len(hosts))
        print(f"{host.tdp}: {operations} operations, {time.time() - begin:.0f} s", flush=True)
    print(f"{walks} walks and {operations} operations of machines, no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
