"""A script as a user writes it, over the whole public API: type checkers accept it in their strict modes, and it runs.

Lines that a type checker has to refuse are marked so, and stand in a function that nobody calls.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import kvmmu
from kvmmu import Acc, Access, Cr0, Cr4, Efer, GuestMemory, Host, PageTables, Regs, RetPf, Status, Vcpu, Vm
from kvmmu.images import Image, ImageError
from kvmmu.traces import Chunk, Op, ParquetTrace, Trace, TraceError, bundled, describe_trace

Addresses = NDArray[np.uint64]


def guest() -> tuple[PageTables, Vcpu]:
    mem = GuestMemory(1 << 20)
    tables = PageTables(mem, "4l")
    tables.map(0x400000, 0x5000, write=False)
    tables.map(0x401000, 0x6000, pkey=3, exec=False)
    vcpu = Vcpu(mem, kvmmu.CpuModel(vendor="amd", conformance="sdm"), tdp="npt")
    vcpu.set_regs(tables.regs(cr0=Cr0.PE | Cr0.PG | Cr0.WP, cr4=Cr4.PAE | Cr4.PKE))
    vcpu.set_regs(efer=Efer.LME | Efer.LMA | Efer.NX, rflags=2)
    return tables, vcpu


def one_walk(vcpu: Vcpu) -> None:
    walk = vcpu.gva_walk
    assert_type(walk.gva_to_gpa(0x400123, Access.USER), int)
    record = walk.walk_record(0x400123, Access.USER | Access.WRITE)
    assert_type(record.status, Status)
    assert record.rule == "write"
    print(repr(record), [step.name for step in record.steps], record.to_dict()["rule"])
    try:
        walk.gva_to_gpa(0x400123, Access.USER | Access.WRITE)
    except kvmmu.PageFault as fault:
        assert fault.error_code == kvmmu.Pferr.PRESENT | kvmmu.Pferr.WRITE | kvmmu.Pferr.USER
        event = vcpu.inject(fault)
        assert isinstance(event, kvmmu.ExceptionInjected)
    found = walk.lookup(0x401000, Access.PROBE)
    assert_type(found.pte_access, Acc)
    mappings = walk.mappings(merge=False).where(writable=True)
    assert_type(mappings.gva, Addresses)
    print([mapping.rights for mapping in mappings], walk.who_maps(0x5000), mappings.to_dict()["gva"])
    print(walk.fmt.is_fault(found.pte_access, Access.FETCH), walk.cpu_role, walk.span(0x400FFC, 8))


def many_walks(vcpu: Vcpu) -> None:
    gva = np.arange(0x400000, 0x402000, 8, dtype=np.uint64)
    access = np.zeros(gva.size, np.uint8)
    t = vcpu.gva_walk.translate(gva, access, fields=("gpa", "status", "level", "refs"))
    assert_type(t.gpa, Addresses)
    assert_type(t.status, NDArray[np.uint8])
    assert_type(t.error_code, NDArray[np.uint32])
    out = kvmmu.Translation.empty(gva.size, ("gpa", "status"))
    again: kvmmu.Translation = vcpu.gva_walk.translate(gva, Access.USER, fields="gpa", threads=2, set_ad=False, out=out)
    sets = vcpu.gva_walk.prepare([vcpu.regs, (vcpu.regs, None)])
    rows = vcpu.gva_walk.translate(gva, regs=sets, ctx=np.zeros(gva.size, np.uint32))
    span = vcpu.gva_walk.translate_span(gva, 16, Access.USER)
    assert_type(span.gpa_next, Addresses)
    print(again, rows, span, len(sets))


def machine(tables: PageTables) -> None:
    host = Host(tdp="ept", max_page="2m", kernel="7.3")
    vm = Vm(tables.mem, host=host, backing="2m")
    vm.trace = kvmmu.Tracepoints("kvm_mmu_set_spte")
    vcpu = vm.create_vcpu(tlb=((64, 4), (32, 4), (4, 4)))
    assert_type(vcpu, Vcpu)
    vcpu.set_regs(tables.regs())
    one = vcpu.access(0x400123, Access.USER)
    assert_type(one.gpa, int)
    many = vcpu.access(np.array([0x400000, 0x401000], np.uint64), Access.USER)
    assert_type(many.gpa, Addresses)
    assert_type(many.exits, NDArray[np.uint8])
    stored = vcpu.store(0x401000, b"12345678", Access.USER)
    assert_type(stored.status, int)
    assert RetPf(one.ret) == RetPf.FIXED
    assert vcpu.read_guest(0x401000, 8) == b"12345678"
    assert_type(vm.stats["pf_fixed"], int)
    vm.invalidate(0, 1 << 20, "protect")
    vcpu.invalidate_addr(vcpu.gva_walk, 0x400000, "all")
    vcpu.mov_cr(3, tables.root)
    vcpu.wrmsr_efer(vcpu.regs.efer)
    vcpu.invlpg(0x400000)
    events: list[kvmmu.TraceEvent] = vm.trace.events()
    print(len(events), vm.audit(), vcpu.mmu.root_hpa, vcpu.tdp_mmu, vcpu.shadow_mmu.w, vcpu.tlb.hits, vm.slots[0]["gpa"])


def nested() -> None:
    mem = GuestMemory(1 << 20)
    below, frames = PageTables(mem, "ept"), range(0x80000, 0x90000, 4096)
    below.map(np.arange(0, 1 << 20, 4096), np.arange(0, 1 << 20, 4096))
    tables = PageTables(mem, "4l", frames=frames)
    tables.map(0x400000, 0x5000)
    vcpu = Vcpu(mem)
    stage = below.second_stage(intercepts=kvmmu.Intercepts(exception_bitmap=1 << 14))
    assert isinstance(stage, kvmmu.Ept)
    assert kvmmu.Npt(0x1000, gmet=True).root == 0x1000
    regs = tables.regs()
    vcpu.enter_nested(stage, cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer)
    try:
        print(hex(vcpu.gva_walk.gva_to_gpa(0x400000)), vcpu.ngpa_walk.gva_to_gpa(0x5000), vcpu.mmu_is_nested)
        vcpu.gva_walk.gva_to_gpa(0x800000)
    except (kvmmu.EptViolation, kvmmu.NestedPageFault, kvmmu.EptMisconfig) as fault:
        print(hex(fault.fault_gpa))
    except kvmmu.GuestFault as fault:
        print(vcpu.gva_walk.inject_page_fault(fault))
    vcpu.leave_nested()


def traces(folder: Path) -> None:
    gva = np.arange(0x400000, 0x500000, 64, dtype=np.uint64)
    np.save(folder / "addresses.npy", gva)
    trace: Trace = kvmmu.open_trace(folder / "addresses.npy")
    chunk: Chunk = next(iter(trace.chunks()))
    assert chunk.op[0] == Op.LOAD
    report = kvmmu.replay(folder / "addresses.npy", page="2m", frames="linear", paging="5l")
    paged = kvmmu.replay(folder / "addresses.npy", pager=kvmmu.Pager("thp", "random", mode="4l"))
    assert_type(report.accesses, int)
    print(report, paged.to_dict()["first_touch_faults"], describe_trace(folder / "addresses.npy")["pages_touched"])
    recorded: kvmmu.Report = kvmmu.replay(bundled())
    assert recorded.mismatches == 0
    try:
        kvmmu.open_trace(folder)
    except (TraceError, OSError) as error:
        print(error)
    print(ParquetTrace.__name__)


def tlbs() -> None:
    level = kvmmu.TlbLevel("L1", sets=16, ways=4, policy="plru", kinds=("load", "store"), pages=("4k",), inclusion="none")
    tlb = kvmmu.TlbHierarchy([level, kvmmu.TlbLevel("L2", 128, 12)], psc={2: kvmmu.TlbLevel("PDE", 1, 32)})
    tlb.access(np.arange(0, 1 << 20, 4096, dtype=np.uint64), Access.READ)
    stats: kvmmu.TlbStats = tlb.stats()
    assert_type(stats.accesses, int)
    print(stats, kvmmu.TlbHierarchy.presets())


def images(folder: Path) -> None:
    mem = GuestMemory(1 << 20)
    tables = PageTables(mem)
    tables.map(0x400000, 0x5000)
    (folder / "guest.ram").write_bytes(mem.read(0, 1 << 20))
    image: Image = kvmmu.open_image(folder / "guest.ram")
    vcpu = image.vcpu(cr3=tables.root)
    assert_type(vcpu, Vcpu)
    print(image.format, image.damage, vcpu.gva_walk.mappings()[0].size)
    try:
        kvmmu.open_image(folder / "guest.ram", "elf")
    except ImageError as error:
        print(error.reason)


def buffers() -> None:
    mem = GuestMemory(np.zeros(8192, np.uint8))
    mem.add_slot(0x10000, bytearray(4096), readonly=True)
    mem.write(0, np.arange(8, dtype=np.uint8))
    mem.write_u64(8, 1)
    assert mem.read_u64(8) == 1
    assert len(GuestMemory.from_slots([(0, memoryview(bytes(4096)))]).slots) == 1


def words() -> None:
    regs = Regs(cr0=Cr0.PE | Cr0.PG, cr3=0x1000, cr4=Cr4.PAE, efer=Efer.LME | Efer.LMA)
    print(regs, regs.is_long_mode, kvmmu.CpuRole.from_regs(regs.cr0, regs.cr4, regs.efer))
    print(kvmmu.PageFormat.permission_bitmask(smep=True, smap=[False, True]).shape, kvmmu.INVALID_GPA, kvmmu.__version__)


def wrong() -> None:
    """Nobody calls this: each line is an error of types."""
    Host(tdp="vt-x")                                    # type: ignore[arg-type]
    kvmmu.CpuModel(vendor="via")                        # type: ignore[arg-type]
    PageTables(GuestMemory(4096), "64")                 # type: ignore[arg-type]
    Vm(GuestMemory(4096), backing="8k")                 # type: ignore[arg-type]
    Vcpu(GuestMemory(4096)).set_regs(cr5=1)             # type: ignore[call-arg]
    print(Vcpu(GuestMemory(4096)).access(1).gpa.size)   # type: ignore[attr-defined]
    Vm(GuestMemory(4096)).create_vcpu(ltb=())           # type: ignore[call-arg]
    kvmmu.TlbLevel("L1", 1, 2, policy="mru")            # type: ignore[arg-type]
    kvmmu.replay("trace", page="4m")                    # type: ignore[arg-type]


def main() -> None:
    tables, vcpu = guest()
    one_walk(vcpu)
    many_walks(vcpu)
    machine(tables)
    nested()
    tlbs()
    buffers()
    words()
    with TemporaryDirectory() as folder:
        traces(Path(folder))
        images(Path(folder))


if __name__ == "__main__":
    main()
