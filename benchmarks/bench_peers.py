"""Other translators over the same tables: the plain C walker, Unicorn, volatility3, and KVM where /dev/kvm opens."""

import ctypes

import numpy as np
import pytest
from cases import BIG, NAMES, SMALL, Batch, guest
from compiled import Missing, plain_walk
from conftest import QUICK, ROWS
from tables import MODES, WARM, Guest

from kvmmu.oracles import kvm

GROUP = "Peers"


@pytest.mark.parametrize("pages", [BIG, SMALL])
def bench_plain_c(race, skipped, rng, pages):
    """A batch against a loop of plain walks in C, one at a time."""
    try:
        plain = plain_walk().plain_walk_rows
    except Missing as missing:
        skipped(GROUP, NAMES[pages], "the plain C walker", str(missing))
    batch = Batch(guest(pages), rng, ROWS)
    memory, size, root = batch.tables.memory.ctypes.data, batch.tables.memory.nbytes, batch.tables.root
    columns = (np.empty(ROWS, np.uint64), np.empty(ROWS, np.uint8), np.empty(ROWS, np.uint32))

    def theirs(gva, *_):
        plain(memory, size, root, gva.ctypes.data, ROWS, *(column.ctypes.data for column in columns))

    def check(*arguments):
        batch.check(*arguments)
        np.testing.assert_array_equal(columns[0], batch.out.gpa)

    race(GROUP, NAMES[pages], "the plain C walker, one at a time", batch.translate, theirs, batch.fresh, rows=ROWS,
         between=batch.tables.chill, check=check, gain=True)


def few(race, rng, against, translate, rows):
    """Race a batch of 200,000 rows against the first rows of it elsewhere."""
    batch = Batch(guest(SMALL, mix=WARM), rng, 200_000)
    found = {}

    def theirs(gva, *_):
        found["gpa"] = translate(gva[:rows])

    def check(gva, access, index):
        batch.check(gva, access, index)
        np.testing.assert_array_equal(batch.out.gpa[:rows], found["gpa"])

    race(GROUP, NAMES[SMALL], against, batch.translate, theirs, batch.fresh, rows=batch.rows, theirs_rows=rows, check=check,
         gain=True, rounds=5 if QUICK else 15)


def bench_unicorn(race, skipped, rng):
    """uc_vmem_translate, called from a loop in C."""
    against = "Unicorn's uc_vmem_translate"
    try:
        import unicorn
        from unicorn import x86_const as x86
        from unicorn.unicorn_py3.unicorn import uclib
    except ImportError as error:
        skipped(GROUP, NAMES[SMALL], against, f"{error} (extra bench)")
    if not hasattr(uclib, "uc_vmem_translate"):
        skipped(GROUP, NAMES[SMALL], against, f"Unicorn {unicorn.__version__} has no uc_vmem_translate")
    try:
        library = plain_walk()
    except Missing as missing:
        skipped(GROUP, NAMES[SMALL], against, str(missing))
    tables, registers = guest(SMALL, mix=WARM), MODES["4-level"][2]
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map_ptr(0, tables.memory.nbytes, unicorn.UC_PROT_ALL, tables.memory.ctypes.data)
    uc.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
    uc.reg_write(x86.UC_X86_REG_CR3, tables.root)
    uc.reg_write(x86.UC_X86_REG_CR4, 0x20)
    uc.reg_write(x86.UC_X86_REG_MSR, (0xC0000080, registers["efer"]))
    uc.reg_write(x86.UC_X86_REG_CR0, registers["cr0"])
    function = ctypes.cast(uclib.uc_vmem_translate, ctypes.c_void_p)

    def translate(gva):
        gpa = np.empty(gva.size, np.uint64)
        good = library.vmem_translate_rows(function, uc._uch, gva.ctypes.data, gva.size, gpa.ctypes.data)
        assert good == gva.size
        return gpa

    few(race, rng, against, translate, 2_000 if QUICK else 10_000)


def bench_volatility3(race, skipped, rng):
    """The layer Intel32e over a buffer, one address after the other, as its users call it."""
    against = "volatility3's Intel32e layer"
    try:
        from volatility3.framework import contexts
        from volatility3.framework.layers import intel, physical
    except ImportError as error:
        skipped(GROUP, NAMES[SMALL], against, f"{error} (extra bench)")

    class Ram(physical.BufferDataLayer):
        """The tables, in a physical address space that reaches as far as their frames do."""

        maximum_address = 1 << 40

    tables, context = guest(SMALL, mix=WARM), contexts.Context()
    context.add_layer(Ram(context, "memory", "memory", tables.memory.tobytes()))
    context.config["layer.memory_layer"] = "memory"
    context.config["layer.page_map_offset"] = tables.root
    layer = intel.Intel32e(context, "layer", "layer")
    few(race, rng, against, lambda gva: np.array([layer.translate(address)[0] for address in gva.tolist()], np.uint64),
        500 if QUICK else 2_000)


def bench_kvm(race, skipped, rng):
    """KVM_TRANSLATE on a live vCPU."""
    reason = kvm.available()
    if reason is not None:
        skipped(GROUP, NAMES[SMALL], "KVM_TRANSLATE", reason)
    tables = Guest(SMALL, mix=WARM)
    with kvm.LiveKvm(tables.memory.nbytes) as live:
        live.words[:] = tables.memory
        live.set_sregs(cr0=0x80010033, cr3=tables.root, cr4=0x20, efer=0xD00)
        few(race, rng, "KVM_TRANSLATE", lambda gva: live.translate_many(gva)[0], 500 if QUICK else 2_000)
