"""Array walks against numpy.take of the leaf entries alone: random addresses over mapped 4K pages, 4 levels, all checks on.

    python benchmarks/bench_translate.py [--pages 32768] [--rows 4000000] [--rounds 15]

Both sides run in turn in one process, with fresh addresses each round; medians of CPU time are printed.
"""

import argparse
import time

import numpy as np

from kvmmu import Access, GuestMemory, Translation, Vcpu

PAGE_BITS = np.uint64(12)
FLAGS = np.uint64(0x67)                 # P W U A D
ROOT, PDPT, DIRECTORIES = 0x1000, 0x2000, 0x4000


def table_pointers(first, count):
    """Entries that point to tables lying one after the other."""
    return np.arange(count, dtype=np.uint64) * np.uint64(0x1000) + np.uint64(first) | FLAGS


def mapped(pages):
    """A vCPU whose linear addresses 0 to pages * 4096 are mapped to shuffled frames, and the leaf entries."""
    directories = -(-pages // (512 * 512))
    leaves = DIRECTORIES + directories * 0x1000
    words = np.zeros((leaves + -(-pages // 512) * 0x1000) // 8, np.uint64)
    words[ROOT // 8] = np.uint64(PDPT) | FLAGS
    words[PDPT // 8:PDPT // 8 + directories] = table_pointers(DIRECTORIES, directories)
    tables = -(-pages // 512)
    words[DIRECTORIES // 8:DIRECTORIES // 8 + tables] = table_pointers(leaves, tables)
    frames = np.random.default_rng(1).permutation(pages).astype(np.uint64) + np.uint64(0x100000)
    words[leaves // 8:leaves // 8 + pages] = frames << PAGE_BITS | FLAGS
    vcpu = Vcpu(GuestMemory(words))
    vcpu.set_regs(cr0=0x80010033, cr3=ROOT, cr4=0x7000A0, efer=0xD01)
    return vcpu, words[leaves // 8:leaves // 8 + pages]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    vcpu, leaves = mapped(args.pages)
    rng = np.random.default_rng(2)
    out, taken = Translation.empty(args.rows), np.empty(args.rows, np.uint64)
    access = np.full(args.rows, Access.USER, np.uint8)
    walks, takes = [], []
    for _ in range(args.rounds):
        gva = rng.integers(0, args.pages << 12, args.rows, np.uint64)
        index = (gva >> PAGE_BITS).astype(np.intp)
        started = time.process_time()
        vcpu.gva_walk.translate(gva, access, out=out)
        between = time.process_time()
        leaves.take(index, out=taken, mode="clip")
        takes.append(time.process_time() - between)
        walks.append(between - started)
        assert (out.gpa == (taken & ~np.uint64(0xFFF)) + (gva & np.uint64(0xFFF))).all()
    walk, take = np.median(walks) / args.rows, np.median(takes) / args.rows
    print(f"{args.pages} pages, {args.rows} rows, median of {args.rounds} rounds: {1e-6 / walk:.1f} M translations/s/core "
          f"({walk * 1e9:.1f} ns), numpy.take {take * 1e9:.2f} ns, ratio {walk / take:.1f}")


if __name__ == "__main__":
    main()
