"""Instructions of a guest under Unicorn, with kvmmu as its MMU and with Unicorn's own."""

import numpy as np
import pytest
from conftest import QUICK

from kvmmu import GuestMemory, PageTables

GROUP = "Embedding"
CODE, DATA, TABLES = 0x10000, 0x400000, 0x1000000
PAGES = 512
# again: mov rdx, rcx; and edx, pages - 1; shl edx, 12; add rax, [rbx + rdx]; mov [rbx + rdx + 8], rax; (flush); dec rcx;
# jnz again
HEAD, TAIL = "4889ca" "81e2{}" "c1e20c" "48030413" "4889441308", "48ffc9"
FLUSH = "83e27f" "7506" "0f20da" "0f22da"                # and edx, 127; jnz behind; mov rdx, cr3; mov cr3, rdx
CASES = {                                               # pages of the loop, flush, instructions of a round
    "64 pages": (64, "", 7), "512 pages, twice what its TLB has": (512, "", 7),
    "64 pages, CR3 loaded every 128 rounds": (64, "89ca" + FLUSH, 10)}


def program(pages, flush):
    """The loop, with a backward jump."""
    body = bytes.fromhex(HEAD.format((pages - 1).to_bytes(4, "little").hex()) + flush + TAIL)
    return body + b"\x0f\x85" + (-len(body) - 6).to_bytes(4, "little", signed=True) + b"\xf4"


@pytest.mark.parametrize("case", CASES)
def bench_guest(race, skipped, case):
    against = "Unicorn's own MMU"
    try:
        import unicorn
        from unicorn import x86_const as x86

        from kvmmu.embed.unicorn import Emulator
    except ImportError as error:
        skipped(GROUP, f"Unicorn, {case}", against, f"{error} (extra unicorn)")
    pages, flush, instructions = CASES[case]
    rounds = 200_000 if QUICK else 2_000_000
    ram = np.zeros(32 << 20, np.uint8)
    mem = GuestMemory(ram)
    tables = PageTables(mem, mode="4l", frames=range(TABLES, TABLES + 1000 * 4096, 4096))
    code = program(pages, flush)
    mem.write(CODE, code)
    for page in (CODE, *range(DATA, DATA + PAGES * 4096, 4096)):
        tables.map(page, page)
    regs = tables.regs()
    control = {"cr0": regs.cr0, "cr3": regs.cr3, "cr4": regs.cr4, "efer": regs.efer}
    emulator = Emulator(mem)
    emulator.load(**control, rip=CODE)
    plain = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    plain.mem_map_ptr(0, ram.nbytes, unicorn.UC_PROT_ALL, ram.ctypes.data)
    plain.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
    for name, value in (("CR3", regs.cr3), ("CR4", regs.cr4), ("CR0", regs.cr0)):
        plain.reg_write(getattr(x86, f"UC_X86_REG_{name}"), value)
    plain.reg_write(x86.UC_X86_REG_MSR, (0xC0000080, regs.efer))

    def start(engine):
        for register, value in ((x86.UC_X86_REG_RBX, DATA), (x86.UC_X86_REG_RCX, rounds), (x86.UC_X86_REG_RAX, 0)):
            engine.reg_write(register, value)

    def ours():
        start(emulator.uc)
        assert emulator.run(CODE) == "halt"

    def theirs():
        start(plain)
        plain.emu_start(CODE, 0)

    def check():
        assert emulator.uc.reg_read(x86.UC_X86_REG_RCX) == plain.reg_read(x86.UC_X86_REG_RCX) == 0
        assert emulator.uc.reg_read(x86.UC_X86_REG_RIP) == plain.reg_read(x86.UC_X86_REG_RIP)
        assert emulator.events == []

    race(GROUP, f"Unicorn, {case}", against, ours, theirs, tuple, rows=rounds * instructions, gain=True, check=check,
         between=lambda: ram[DATA:DATA + PAGES * 4096].fill(0), bars=[("at least", 0.5)], rounds=5 if QUICK else 15)
