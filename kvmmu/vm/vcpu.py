"""Vm and Vcpu, which make each other: a Vm its vCPUs, a Vcpu that is made alone its Vm."""

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import CR3_NOFLUSH, Acc, Access, Cr0, Cr4, Efer
from kvmmu.arch.arguments import check_bool, check_choice, check_int, check_name, check_word
from kvmmu.arch.delivery import ExceptionInjected, ExitToL1, deliver_nested_fault, deliver_page_fault
from kvmmu.arch.faults import GeneralProtection, GuestFault, NestedFault, PageFault
from kvmmu.arch.registers import (
    CpuModel,
    RegisterValues,
    Regs,
    after_mov_cr,
    after_wrmsr_efer,
    after_wrmsr_pkrs,
    after_wrpkru,
    is_canonical,
    with_registers,
)
from kvmmu.arch.second_stages import Ept, Npt, Stage
from kvmmu.machine._audit_tlb import audit_tlb
from kvmmu.machine._hw_record import hw_walk_record
from kvmmu.machine._machine import Machine
from kvmmu.machine._mmus import Mmu, ShadowMmu, TdpMmu
from kvmmu.memory._lock import MachineLock
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.host import Host
from kvmmu.tlb._tlb import Tlb
from kvmmu.vm.guest_accesses import read_emulated, store, write_emulated
from kvmmu.vm.guest_state import GuestState, changes_roles, check_offered, known_registers
from kvmmu.vm.locked import PartOfMachine, as_bytes, locked
from kvmmu.vm.snapshot import load_into, take_snapshot
from kvmmu.vm.virtual_machine import PageSize, VirtualMachine
from kvmmu.vm.vmx_operands import EPT_CONTEXT, check_invept, check_invvpid, check_vmx
from kvmmu.walk.pagewalk import PageWalk
from kvmmu.walk.record import WalkRecord
from kvmmu.walk.results import Accesses, OneAccess, check_one_access

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Vcpu", "Vm"]

_ACC_ALL = int(Acc.READ | Acc.WRITE | Acc.USER | Acc.EXEC)
_TDP_KINDS = ("ept", "npt", None)
_LEVEL_NAMES: dict[int, PageSize] = {1: "4k", 2: "2m", 3: "1g"}
# Flags as plain integers, whose operators make no members
_FLUSHING_CR4 = int(Cr4.PGE | Cr4.PCIDE | Cr4.PAE | Cr4.PSE | Cr4.LA57)
_PG, _PCIDE, _SMEP = int(Cr0.PG), int(Cr4.PCIDE), int(Cr4.SMEP)
_READ_MAX = 1 << 32
_LOADS_PDPTRS = frozenset({"cr0", "cr3", "cr4", "efer"})
_of_tables = attrgetter(*_LOADS_PDPTRS, "pdptrs")           # the registers that roots and roles are made of
_WRITE = int(Access.WRITE)


class Vm(VirtualMachine):
    """One virtual machine.

    Parameters
    ----------
    mem : GuestMemory
        Guest-physical memory. Its slots are the memslots: adding and removing them there is what a VMM does with KVM's.
    cpu : CpuModel, optional
        The guest's processor, of every vCPU.
    host : Host, optional
    smm_mem : GuestMemory, optional
        The address space of system-management mode; by default that of `mem`.
    backing : {"4k", "2m", "1g"}, optional
        Pages that the host has behind the memory; by default its largest.
    slot_zap_all : bool
        Deleting or moving a memslot drops all page tables (KVM's quirk, on unless a VMM turns it off), else only what maps the
        slot or shadows tables in it.

    Attributes
    ----------
    vcpus : list of Vcpu
        In the order in which they were made. The machine keeps them; one that is taken from the list leaves the machine when
        nobody else holds it.

    Notes
    -----
    A machine is locked during a call; a second thread that uses it waits until the call ends. That holds for accesses, loads
    and flushes of the guest, operations of the host, `stats`, `audit()`, `Tlb` and MMU methods. Slots that are added to or
    removed from `mem` itself count from the next call on. In a forked process a machine that nobody ran at the fork works; one
    that another thread ran raises RuntimeError.

    The guest may be wider than its host (`cpu.maxphyaddr` above `host.maxphyaddr`), which KVM leaves to the VMM. Translations
    then are those of `cpu`, MMIO beyond the host's width exits at every access because no entry can mark it, and memory there
    is backed by frames that the host has. A processor would raise a #PF with RSVD for such an address under two-dimensional
    paging.
    """

    def create_vcpu(self, *, tlb: Sequence[tuple[int, int]] | None = None) -> "Vcpu":
        """Return a new `Vcpu` of this machine.

        Parameters
        ----------
        tlb : sequence of (int, int), optional
            Sets and ways of its TLB for 4K, 2M and 1G pages.
        """
        return Vcpu(self.mem, self.cpu, self.host.tdp, smm_mem=self.smm_mem, vm=self, tlb=tlb)

    def clone(self) -> "Vm":
        """Return another machine in the state of this one, with memory of its own, that goes on exactly as this one would.

        Its vCPUs are new objects, in the order of `vcpus`.

        Raises
        ------
        RuntimeError, ValueError
            As `snapshot()`.

        Notes
        -----
        Costs a copy of the page tables, and `GuestMemory.copy()`: a clone of a clone takes the pages that were changed since the
        first one. Slots over a file that its owner mapped read-only share its bytes.
        """
        return self._clone()[0]

    def _clone(self) -> "tuple[Vm, dict[Vcpu, Vcpu]]":
        """Return a clone, and the counterparts of all vCPUs."""
        with self._lock:
            self._lock.check_outermost("clone()")
            snapshot = take_snapshot(self, memory=False)
            mem = self.mem.copy()
            smm_mem = mem if self.smm_mem is self.mem else self.smm_mem.copy()
        vm = Vm(mem, self.cpu, self.host, smm_mem=smm_mem, backing=_LEVEL_NAMES[self.kvm.backing])
        counterparts = {saved.vcpu: vm.create_vcpu() for saved in snapshot._vcpus}
        with vm._lock:
            load_into(vm, snapshot, counterparts)
        return vm, counterparts


class Vcpu(PartOfMachine):
    """One virtual processor.

    Parameters
    ----------
    mem : GuestMemory
        Guest-physical memory.
    cpu : CpuModel, optional
        The guest's processor.
    tdp : {"ept", "npt", None}
        Two-dimensional paging of the host, None for shadow paging.
    smm_mem : GuestMemory, optional
        The address space of system-management mode; by default that of `mem`.
    vm : Vm, optional
        The machine that it belongs to; `Vm.create_vcpu()` says so. By default one of its own, made at the first access.
    tlb : sequence of (int, int), optional
        Sets and ways of its TLB for 4K, 2M and 1G pages.

    Attributes
    ----------
    gva_walk : PageWalk
        Linear address to guest-physical address, by the registers of whoever runs now.
    ngpa_walk : PageWalk
        The second stage under a nested guest. Not in use outside one.
    cr2 : int
        The linear address of the last #PF that `inject()` delivered to the guest that runs.
    rip : int
        Of the instruction under way, for whoever emulates one: KVM lets a write to a shadowed table be repeated once.

    Notes
    -----
    The vCPUs of a machine share its lock: a second thread that uses one waits until the call of the first ends; see `Vm`.
    """

    def __init__(self, mem: GuestMemory, cpu: CpuModel | None = None, tdp: Literal["ept", "npt"] | None = "ept", *,
                 smm_mem: GuestMemory | None = None, vm: Vm | None = None,
                 tlb: Sequence[tuple[int, int]] | None = None) -> None:
        for name, memory in (("mem", mem), ("smm_mem", mem if smm_mem is None else smm_mem)):
            if not isinstance(memory, GuestMemory):
                raise TypeError(f"{name}: want a GuestMemory, got {type(memory).__name__}")
        check_name("tdp", tdp, _TDP_KINDS)
        _check_vm(vm, mem, mem if smm_mem is None else smm_mem, tdp)
        self._lock = MachineLock() if vm is None else vm.kvm.lock
        self._guest = GuestState(mem, mem if smm_mem is None else smm_mem, CpuModel() if cpu is None else _check_cpu(cpu), tdp)
        self.gva_walk, self.ngpa_walk = self._guest.gva_walk, self._guest.ngpa_walk
        self.gva_walk._set_delivery(self._deliver_page_fault)
        self.ngpa_walk._set_delivery(self._deliver_nested_fault)
        self.cr2 = 0
        self.rip = 0
        self._vm, self._tlb = vm, Tlb() if tlb is None else Tlb(tlb)
        self._made: Machine | None = None           # made at the first use: walks alone need none
        self.id = 0
        if vm is not None:
            self.id = vm._join(self)

    @property
    def mem(self) -> GuestMemory:
        """The GuestMemory of the address space in force."""
        return self._guest.mem

    @property
    def tdp(self) -> Literal["ept", "npt"] | None:
        """Two-dimensional paging of the host: "ept", "npt" or None."""
        return self._guest.tdp

    @property
    def regs(self) -> Regs:
        """The registers in force (`Regs`); after power-up those of a reset, with paging off."""
        return self._guest.regs

    @property
    def pdptrs(self) -> tuple[int, ...] | None:
        """The four PDPTE registers, stale until reloaded; None outside PAE paging.

        Under nested paging of SVM there are no registers: the words in memory now, None where L1 does not map them.
        """
        regs = self._guest.regs
        if regs.pdptrs is not None or not regs.is_pae_paging:
            return regs.pdptrs
        try:
            return tuple(self.gva_walk.get_pdptr(i) for i in range(4))
        except NestedFault:
            return None

    @property
    def cpu(self) -> CpuModel:
        """The processor model. Setting it builds every role and format anew.

        Raises
        ------
        GeneralProtection
            The registers in force are illegal on the new model; nothing changed.
        ValueError
            The vCPU runs on a machine, which has no memory encryption (`c_bit`); nothing changed.
        """
        return self._guest.cpu

    @cpu.setter
    @locked
    def cpu(self, cpu: CpuModel) -> None:
        running = self._running()
        if _check_cpu(cpu).c_bit is not None and running is not None:
            raise ValueError(f"c_bit {cpu.c_bit}: the machine has no memory encryption; want None")
        self._guest.set_cpu(cpu)
        if running is not None:
            running.set_cpu()
            self._flush_guest()

    @property
    def smm(self) -> bool:
        """True if the vCPU is in system-management mode, which has another address space and a role of its own.

        KVM leaves a nested guest before it enters SMM. One that is made to run there has all of its memory, and L1's second
        stage, in the address space of SMM.
        """
        return self._guest.smm

    @smm.setter
    @locked
    def smm(self, smm: bool) -> None:
        if self._guest.set_smm(check_bool("smm", smm)) and (running := self._running()) is not None:
            running.reset_context()

    @locked
    def set_regs(self, regs: Regs | None = None, /, **registers: Unpack[RegisterValues]) -> None:
        """Load any of cr0, cr3, cr4, efer, pkru, rflags, pdptrs, pkrs, or all of a `Regs`, as a VMM does: validated as a
        whole, all or nothing.

        No transition rules apply, and LMA is taken from `efer` as given. Under PAE paging a change of cr0, cr3, cr4 or efer
        loads the PDPTEs from memory at CR3, unless they are given; they are checked either way. An NPT host does neither: its
        guest has no such registers. Registers that change, and PDPTEs that are loaded, flush the guest's translations.

        Raises
        ------
        GeneralProtection
            The resulting state is illegal; nothing changed.
        ValueError
            The vCPU runs on a machine, and KVM offers no guest what CR4.PKS, CR4.LASS or EFER.UAIE turn on; nothing changed.
        TypeError
            No such register, or no Regs.
        """
        if regs is not None and not isinstance(regs, Regs):
            raise TypeError(f"regs: want a Regs, got {type(regs).__name__}")
        loaded: dict[str, Any] = {} if regs is None else {each.name: getattr(regs, each.name) for each in fields(Regs)}
        loaded |= known_registers(registers)
        stale: dict[str, Any] = {} if _LOADS_PDPTRS.isdisjoint(loaded) else {"pdptrs": None}
        guest, before = self._guest, self._guest.regs
        after = guest.admit(with_registers(before, **(stale | loaded)), guest.second)
        running = self._running()
        if running is not None:
            check_offered(before, after)
        guest.load(after)
        if running is not None and ((stale and after.pdptrs is not None) or _of_tables(before) != _of_tables(after)):
            running.reset_context(True)

    @locked
    def mov_cr(self, n: int, value: int) -> None:
        """MOV to CR0, CR3 or CR4 by the guest, with the rules of the transition.

        Setting CR0.PG under EFER.LME enters long mode, clearing it leaves it (from compatibility mode: CS.L is not
        modelled). The PDPTEs are loaded again where the manual says so, and never under nested paging of SVM. CR3 bit 63 under
        CR4.PCIDE is not stored.

        Raises
        ------
        GeneralProtection
            The transition is illegal; nothing changed.
        ValueError
            No such control register, a value wider than the guest's operand, or CR4.PKS and CR4.LASS on a machine: KVM offers
            them to no guest.
        """
        n, value = check_choice("n", n, (0, 3, 4)), check_word("value", value)
        guest, before = self._guest, self._guest.regs
        after = after_mov_cr(guest.cpu, before, n, value, guest.table_space(guest.second))
        running = self._running()
        if n == 4 and running is not None:
            check_offered(before, after)
        guest.load(after)
        if running is None:
            return
        if n == 3:
            running.mov_cr3(before.cr3, bool(after.cr4 & _PCIDE and value & CR3_NOFLUSH), before.pdptrs != after.pdptrs)
            return
        if changes_roles(before, after) or after.cr4 & ~before.cr4 & _PCIDE:
            running.reset_context()
        elif before.pdptrs != after.pdptrs:                 # the same CR3, and another root
            running.mov_cr3(before.cr3, True, True)
        if (before.cr0 ^ after.cr0) & _PG or (before.cr4 ^ after.cr4) & _FLUSHING_CR4 or after.cr4 & ~before.cr4 & _SMEP:
            self._flush_guest()

    @locked
    def wrmsr_efer(self, value: int) -> None:
        """WRMSR to IA32_EFER by the guest. LMA is read-only: what is written there is ignored.

        Raises
        ------
        GeneralProtection
            A reserved bit, or LME changed while paging; nothing changed.
        ValueError
            UAIE on a machine: KVM offers no guest upper address ignore.
        """
        before, running = self._guest.regs, self._running()
        after = after_wrmsr_efer(self._guest.cpu, before, check_word("value", value))
        if running is not None:
            check_offered(before, after)
        self._guest.load(after)
        if (before.efer ^ after.efer) & (Efer.NX | Efer.LME) and running is not None:
            running.reset_context(True)

    @locked
    def wrpkru(self, value: int) -> None:
        """WRPKRU by the guest.

        Raises
        ------
        InvalidOpcode
            CR4.PKE is clear.
        """
        self._guest.load(after_wrpkru(self._guest.regs, check_word("value", value, 32)))

    @locked
    def wrmsr_pkrs(self, value: int) -> None:
        """WRMSR to IA32_PKRS by the guest.

        Raises
        ------
        GeneralProtection
            The processor model has no PKS, or the value has more than 32 bits.
        """
        self._guest.load(after_wrmsr_pkrs(self._guest.cpu, self._guest.regs, check_word("value", value)))

    @locked
    def invlpg(self, gva: int) -> None:
        """INVLPG by the guest: translations of an address, of this PCID and global ones.

        An address that is not canonical for the widest paging that the processor has does nothing.
        """
        gva = check_word("gva", gva)
        if (running := self._running()) is not None:
            running.invlpg(gva)

    @locked
    def invpcid(self, type: int, pcid: int = 0, gva: int = 0) -> None:
        """INVPCID by the guest: 0 an address of a PCID, 1 a PCID, 2 everything, 3 everything but global translations.

        Raises
        ------
        GeneralProtection
            No such type, a PCID other than 0 while CR4.PCIDE is clear, or an address that is not canonical for the widest paging
            that the processor has.
        """
        type, pcid, gva = check_word("type", type), check_word("pcid", pcid, 12), check_word("gva", gva)
        if type > 3 or (pcid and type < 2 and not self._guest.regs.cr4 & Cr4.PCIDE) or (
                type == 0 and not is_canonical(self._guest.cpu, gva)):
            raise GeneralProtection(f"#GP: INVPCID type {type}, PCID {pcid:#x}, address {gva:#x}", rule="invpcid")
        if (running := self._running()) is not None:
            running.invpcid(type, pcid, gva)

    @locked
    def invalidate_addr(self, walk: PageWalk, addr: int, roots: Literal["current", "all"] = "current") -> None:
        """Invalidate translations of an address of a walk, as KVM does when it delivers a fault or emulates INVLPG.

        Parameters
        ----------
        walk : PageWalk
            `gva_walk`: under two-dimensional paging only the TLB holds such translations. `ngpa_walk`: the tables that shadow
            L1's second stage; nothing happens while L2 does not run under one.
        addr : int
            Non-canonical, or wider than L1's tables translate: nothing happens.
        roots : {"current", "all"}
            Of shadow page tables.

        """
        check_name("roots", roots, ("current", "all"))
        self._guest.check_walk(walk)
        addr = check_word("addr", addr)
        if (running := self._running()) is None:
            return
        if walk is self.gva_walk:
            running.invalidate_addr(addr, True, roots == "all")
        else:
            running.invalidate_ngpa(addr, True, roots == "all")

    # ---- the machine -------------------------------------------------------------------------------------------------

    @property
    @locked
    def vm(self) -> Vm:
        """The machine that this vCPU belongs to."""
        if self._vm is None:
            vm = Vm.__new__(Vm)
            vm._make(self._guest.spaces[0], self._guest.cpu, Host(tdp=self.tdp), self._guest.spaces[1], lock=self._lock)
            self.id = vm._join(self)
            self._vm = vm
        return self._vm

    def clone(self) -> "Vcpu":
        """Return the counterpart of this vCPU in `Vm.clone()` of its machine."""
        return self.vm._clone()[1][self]

    @locked
    def _machine(self) -> Machine:
        """Return this vCPU on its host, made at the first use."""
        if self._made is None:
            self._made = Machine(self.vm.kvm, self.id, self._tlb, self.gva_walk, self.ngpa_walk)
        return self._made

    def _running(self) -> Machine | None:
        """Return this vCPU on its host; None before the first use, and after `Vm.restore()` to a time before it."""
        made = self._made
        return made if made is not None and made.joined else None

    @property
    def tlb(self) -> Tlb:
        """The TLB of the processor that it runs on."""
        return self._tlb

    @property
    @locked
    def tdp_mmu(self) -> TdpMmu | None:
        """The builder of page tables under two-dimensional paging, for all but nested guests with nested paging; None without."""
        return self._machine().update().tdp_mmu

    @property
    @locked
    def shadow_mmu(self) -> ShadowMmu:
        """The builder of tables that shadow the guest's: all of them without two-dimensional paging, else L1's EPT or NPT."""
        return self._machine().update().shadow_mmu

    @property
    @locked
    def mmu(self) -> Mmu:
        """The builder of page tables that is active."""
        return self._machine().active_mmu()

    @property
    @locked
    def root_mmu(self) -> Mmu:
        """KVM's name for the MMU that is active outside nested paging."""
        return self._machine().update().root_mmu

    @property
    @locked
    def guest_mmu(self) -> ShadowMmu | None:
        """KVM's name for the MMU that is active under nested paging; None without two-dimensional paging."""
        return None if self.tdp is None else self.shadow_mmu

    @locked
    def vm_enter(self) -> None:
        """Enter the guest: load a root, synchronize it, flush, as far as that was requested."""
        self._machine().vm_enter()

    def _flush_guest(self) -> None:
        if (running := self._running()) is not None:
            running.flush_guest()

    @locked
    def drain_pml(self) -> None:
        """Take what the processor logged so far into the dirty log, as each exit does."""
        if (running := self._running()) is not None:
            running.drain_pml()

    def _logged(self) -> set[tuple[int, int]]:
        """Return what the processor logged and no exit has drained: (address space, guest frame)."""
        return set() if (running := self._running()) is None else running.logged()

    @locked
    def audit_tlb(self) -> list[str]:
        """Return one line for each TLB entry whose host page, or whose right to write it, was taken away without a flush."""
        return [] if (running := self._running()) is None else audit_tlb(running)

    # ---- accesses ----------------------------------------------------------------------------------------------------

    @overload
    def access(self, gva: NDArray[np.uint64], access: int | NDArray[np.uint8] = 0, *, out: Accesses | None = None) -> Accesses:
        ...

    @overload
    def access(self, gva: int, access: int = 0) -> OneAccess:
        ...

    def access(self, gva: int | NDArray[np.uint64], access: int | NDArray[np.uint8] = 0, *,
               out: Accesses | None = None) -> Accesses | OneAccess:
        """Access memory as the guest does: by the TLB, the processor's walk, exits, and KVM's handling of them.

        Parameters
        ----------
        gva : int, or ndarray of uint64, shape (n,), C-contiguous
            Linear addresses (bytes), one after the other.
        access : Access, or ndarray of uint8, shape (n,)
            EFLAGS.AC of the vCPU is added to a single access; arrays say `Access.AC`.
        out : Accesses, optional
            Columns to reuse, n rows each; for arrays.

        Returns
        -------
        Accesses
            Columns of n rows; of a single access integers.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
            A single access faults in the guest. In arrays that is data.
        KeyboardInterrupt
            Ctrl-C ends a long array between two rows: those before it have happened, and `out` has them.

        Notes
        -----
        The bytes of a write are not known here (see `store()`): where KVM has to carry it out, it is an aligned write of
        the present bytes, 8 of them, or 4 with CR4.PAE clear.
        """
        if not isinstance(gva, np.ndarray):
            if out is not None:
                raise ValueError("out: is for arrays")
            return (self._made or self._machine()).access_one(gva, access, self.rip)  # type: ignore[arg-type]  # checked there
        if out is not None and not isinstance(out, Accesses):
            raise TypeError(f"out: want an Accesses or None, got {type(out).__name__}")
        columns = Accesses.empty(gva.size) if out is None else out.check(gva.size)
        self._machine().access(gva, access, columns.arrays())
        return columns

    def hw_walk_record(self, gva: int, access: int = 0) -> WalkRecord:
        """Return the processor's own walk of one address through the SPTEs, level by level. Nothing changes by it.

        Under two-dimensional paging these are the guest's tables, each entry reached through the SPTEs, and the SPTEs of the
        address behind them; without, the SPTEs that shadow the guest's tables. Faults are part of the record: an exit, or a #PF.

        Parameters
        ----------
        gva : int
            Linear address (bytes).
        access : Access
            EFLAGS.AC of the vCPU is added.

        Returns
        -------
        WalkRecord
            Its `gpa` is a host-physical address. `plot_walk()` draws it.

        Raises
        ------
        RuntimeError
            The processor has no root: before the first access or `vm_enter()`, or after an operation of the host took it away.

        Notes
        -----
        The TLB is not asked. What the processor finds depends on accesses before: the SPTEs are made by the exits of these.
        """
        return hw_walk_record(self._machine(), gva, access)

    @locked
    def store(self, gva: int, data: "Buffer | NDArray[Any]", access: int = 0, *, page_table_writing: bool = True) -> OneAccess:
        """Write memory as the guest does, with the bytes.

        Parameters
        ----------
        gva : int
            Linear address (bytes) of the first byte.
        data : bytes, or another buffer
            A page boundary in it is crossed as by one instruction: all or nothing, but where KVM has to carry it out, as
            `write_guest()`. Empty: only translate the address.
        access : Access
            USER, AC or IMPLICIT; WRITE is added.
        page_table_writing : bool
            The instruction is of a kind that KVM expects to write page tables (MOV, XCHG, CMPXCHG, AND, OR, BTS, ...); others
            (ADD, SUB, INC, MOVNTI, ...) it has repeated without shadow pages of the frame, rather than emulate them.

        Returns
        -------
        Accesses
            Integers, of the first byte. MMIO takes no bytes: its `hpa` is INVALID_GPA.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
            Nothing was written.
        """
        gva, access = check_word("gva", gva), check_one_access(access) | _WRITE
        page_table_writing = check_bool("page_table_writing", page_table_writing)
        return store(self._machine(), gva, as_bytes(data), access, self.rip, page_table_writing=page_table_writing)

    @locked
    def write_guest(self, gva: int, data: "Buffer | NDArray[Any]", access: int = 0) -> int:
        """Write memory as an instruction that KVM emulates: by KVM's own walk of the guest's tables, not through the host's.

        Parameters
        ----------
        gva : int
            Linear address (bytes) of the first byte.
        data : bytes, or another buffer
        access : Access
            USER, AC or IMPLICIT; WRITE is added.

        Returns
        -------
        int
            How many bytes reached memory; the others are MMIO: a hole, or a read-only slot.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
            The bytes before the page that faults were written.
        ValueError
            An access that KVM's emulator does not make: to a shadow stack, or a probe.
        """
        gva, access = check_word("gva", gva), check_one_access(access) | _WRITE
        return write_emulated(self._machine(), gva, as_bytes(data), access)

    @locked
    def read_guest(self, gva: int, n: int, access: int = 0) -> bytes:
        """Read memory as an instruction that KVM emulates, as `write_guest()` writes it.

        Parameters
        ----------
        gva : int
            Linear address (bytes) of the first byte.
        n : int
            How many bytes, 0 to 2**32; MMIO reads as zero.
        access : Access
            USER, AC, FETCH or IMPLICIT.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
        """
        gva, n = check_word("gva", gva), check_int("n", n, 0, _READ_MAX)
        return read_emulated(self._machine(), self.mem, gva, n, check_one_access(access))

    # ---- nested guests ------------------------------------------------------------------------------------------------

    @property
    def mmu_is_nested(self) -> bool:
        """True if L2 runs under a second stage of L1's, on a host with two-dimensional paging."""
        return self._guest.second is not None

    @locked
    def enter_nested(self, stage: Stage | None, **registers: Unpack[RegisterValues]) -> None:
        """Run L2: under L1's second stage (`Ept` or `Npt`), or without nested paging (None).

        Parameters
        ----------
        stage : Ept, Npt or None
        **registers
            L2's cr0, cr3, cr4, efer, pkru, rflags, pdptrs; those not given are L1's. Under PAE paging PDPTEs that are not given
            are loaded from memory through the second stage. Under an Npt none are: a walk reads and checks the one that it
            uses. Without nested paging KVM checks them here, on an NPT host too.

        Raises
        ------
        GeneralProtection, NestedFault
            L2's registers are illegal, or the second stage does not reach its PDPTEs; nothing changed.
        ValueError
            A second stage without two-dimensional paging on the host, one that VM entry refuses, or registers that turn on what
            KVM offers no guest, as for `set_regs()`.
        """
        if stage is not None and not isinstance(stage, (Ept, Npt)):
            raise TypeError(f"stage: want an Ept, an Npt or None, got {type(stage).__name__}")
        if stage is not None and self.tdp is None:
            raise ValueError("stage: a host without two-dimensional paging (tdp=None) has no nested EPT or NPT; want None")
        if stage is not None and stage.root & self.cpu.rsvd_gpa_bits:
            raise ValueError(f"root {stage.root:#x}: bits beyond MAXPHYADDR {self.cpu.maxphyaddr} are reserved")
        self._guest.enter_nested(stage, registers, on_machine=self._running() is not None)
        self._flush_guest()

    @locked
    def leave_nested(self) -> None:
        """Run L1 again, with the registers it had. Harmless when not nested."""
        if self._guest.leave_nested():
            self._flush_guest()

    @locked
    def invept(self, type: int, eptp: int = 0) -> None:
        """INVEPT by L1: type 1 drops what derives from one EPTP, type 2 what derives from any.

        The roots that shadow L1's EPT are left, the ones before as well, and what the TLB has under them goes: the next
        `enter_nested()` begins with a root that agrees with L1's tables.

        Parameters
        ----------
        type : int
        eptp : int
            EPT pointer of type 1.

        Raises
        ------
        VmFail
            No such type, or an EPTP that VM entry would refuse (VM-instruction error 28).
        InvalidOpcode
            The processor is AMD's, or the host gives L1 no EPT.
        ValueError
            L2 runs: it has no INVEPT, which would exit to L1.

        Notes
        -----
        Source: SDM vol. 3, "INVEPT-Invalidate Translations Derived from EPT".
        """
        type, eptp = check_word("type", type), check_word("eptp", eptp)
        check_vmx(self.cpu, "INVEPT", l2_runs=self._guest.guest_mode, has_it=self.tdp is not None)
        check_invept(self.cpu, type, eptp)
        if (running := self._running()) is not None:
            running.invept(eptp if type == EPT_CONTEXT else None)

    @locked
    def invvpid(self, type: int, vpid: int, gva: int = 0) -> None:
        """INVVPID by L1: 0 an address of a VPID, 1 a VPID, 2 all VPIDs but L1's own, 3 a VPID but for global translations.

        All of L2's translations count as those of any VPID. Without two-dimensional paging of the host the roots that shadow
        L2's tables are left as well.

        Parameters
        ----------
        type : int
        vpid : int
            Not 0, except with type 2.
        gva : int
            Linear address of type 0.

        Raises
        ------
        VmFail
            No such type, VPID 0 or one of more than 16 bits, or an address that is not canonical for the widest paging of the
            processor (VM-instruction error 28).
        InvalidOpcode
            The processor is AMD's.
        ValueError
            L2 runs: it has no INVVPID, which would exit to L1.

        Notes
        -----
        Source: SDM vol. 3, "INVVPID-Invalidate Translations Based on VPID".
        """
        type, vpid, gva = check_word("type", type), check_word("vpid", vpid), check_word("gva", gva)
        check_vmx(self.cpu, "INVVPID", l2_runs=self._guest.guest_mode, has_it=True)
        check_invvpid(self.cpu, type, vpid, gva)
        if (running := self._running()) is not None:
            running.invvpid(type, gva)

    @locked
    def translate_gpa(self, walk: PageWalk, gpa: int, access: int = 0, pte_access: int = 15) -> int:
        """Return a guest-physical address of a walk as L1 sees it: itself, except for gva_walk under a second stage.

        Parameters
        ----------
        walk : PageWalk
            Whose address it is.
        gpa : int
            Bytes.
        access : Access
        pte_access : int
            Rights (`Acc`) of the first stage; under EPT its U decides what MBEC checks.

        Returns
        -------
        int

        Raises
        ------
        NestedFault
        """
        self._guest.check_walk(walk)
        gpa, access = check_word("gpa", gpa), check_one_access(access)
        pte_access = check_int("pte_access", pte_access, 0, _ACC_ALL)
        if walk is not self.gva_walk or not self.mmu_is_nested:
            return gpa
        return self.ngpa_walk._second_stage_gpa(gpa, access, pte_access)

    @locked
    def inject(self, fault: GuestFault, from_hardware: int | None = None) -> ExceptionInjected | ExitToL1:
        """Deliver a fault of a translation by the walk that failed: a #PF by gva_walk, a fault of the second stage by ngpa_walk.

        Parameters
        ----------
        fault : PageFault or NestedFault
            As a scalar call raised it, or made by hand.
        from_hardware : int, optional
            If the fault derives from the exit that is being handled, its exit qualification or EXITINFO1. A #PF needs none.

        Returns
        -------
        ExceptionInjected, VmxExit or SvmExit
            What happens. A #PF that the guest takes sets `cr2`; an exit changes nothing: `leave_nested()` is the caller's.

        Raises
        ------
        TypeError
            Neither kind of fault, or not one of this second stage.
        ValueError
            A fault of a second stage, and none is in force.
        """
        walk = self.ngpa_walk if isinstance(fault, NestedFault) else self.gva_walk
        return walk.inject_page_fault(fault, from_hardware)

    def _deliver_page_fault(self, fault: GuestFault, from_hardware: int | None) -> ExceptionInjected | ExitToL1:
        if not isinstance(fault, PageFault):
            raise TypeError(f"fault: gva_walk delivers a PageFault, got {type(fault).__name__}")
        if from_hardware is not None:
            check_word("from_hardware", from_hardware)
        second = self._guest.second
        stage = None if second is None else second.stage
        event = deliver_page_fault(fault, stage, self._guest.guest_mode, vendor=self.cpu.vendor)
        if isinstance(event, ExceptionInjected) and event.cr2 is not None:
            self.cr2 = event.cr2
        return event

    def _deliver_nested_fault(self, fault: GuestFault, from_hardware: int | None) -> ExceptionInjected | ExitToL1:
        if not isinstance(fault, NestedFault):
            raise TypeError(f"fault: ngpa_walk delivers a NestedFault, got {type(fault).__name__}")
        second = self._guest.second
        return deliver_nested_fault(fault, None if second is None else second.stage, from_hardware)

    def __repr__(self) -> str:
        nested = f" in L2 under {self._guest.second.stage!r}" if self._guest.second is not None else ""
        return f"<Vcpu {self.id}: {self.regs!r}, level {self.gva_walk.cpu_role.level}{nested}, tdp {self.tdp}>"


def _check_vm(vm: Vm | None, mem: GuestMemory, smm_mem: GuestMemory, tdp: str | None) -> None:
    """Raise unless the memory and tdp of a vCPU are those of its machine."""
    if not isinstance(vm, Vm | None):
        raise TypeError(f"vm: want a Vm, got {type(vm).__name__}")
    if vm is not None and (mem is not vm.mem or smm_mem is not vm.smm_mem or tdp != vm.host.tdp):
        raise ValueError(f"vm: {vm!r} has another memory or another tdp; create_vcpu() makes a vCPU with its own")


def _check_cpu(cpu: CpuModel) -> CpuModel:
    if not isinstance(cpu, CpuModel):
        raise TypeError(f"cpu: want a CpuModel, got {type(cpu).__name__}")
    return cpu
