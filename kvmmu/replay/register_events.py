"""Registers of a replay: the contexts of recordings and traces put in force, and what register events make of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvmmu.arch._bits import CR3_NOFLUSH, Cr4, Op
from kvmmu.arch.faults import GeneralProtection
from kvmmu.arch.registers import (
    CpuModel,
    Regs,
    after_mov_cr,
    after_wrmsr_efer,
    after_wrmsr_pkrs,
    after_wrpkru,
    check_pdptrs,
    pdpte_gpas,
)
from kvmmu.arch.second_stages import Ept, Npt, Stage
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay._replay_registers import ReplayRegisters
from kvmmu.traces import Header, RegisterSet, TraceError
from kvmmu.traces import Stage as TraceStage
from kvmmu.vm.vcpu import Vcpu
from kvmmu.walk._register_sets import RegisterSets

__all__ = ["REGISTER_EVENTS", "Context", "RegisterEvents", "context_of", "contexts_of", "lacks_pdptrs", "pdptrs_at",
           "plain_contexts", "use_context"]

Context = Regs | tuple[Regs, Stage]       # inside a nested guest: with its second stage

_NAMED = (Op.SET_REGS, Op.VMENTER, Op.VMEXIT)       # they name a register set of the header
REGISTER_EVENTS = (*_NAMED, Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.WRPKRU, Op.WRMSR_PKRS)
_SETS = 1024                            # kept ready


def registers_of(regs: Regs) -> dict[str, Any]:
    """Return the registers that a context sets, by name."""
    return {name: getattr(regs, name) for name in ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs", "pkrs")}


def use_context(vcpu: Vcpu, context: Context) -> None:
    """Put a register context in force: a Regs, or (Regs, Npt or Ept) inside the nested guest."""
    vcpu.leave_nested()
    if isinstance(context, tuple):
        regs, stage = context
        vcpu.enter_nested(stage, **registers_of(regs))
    else:
        vcpu.set_regs(**registers_of(context))


def context_of(regs: RegisterSet) -> Context:
    """Return the context that a register set of a header describes.

    Raises
    ------
    TraceError
        There is no such second stage.
    """
    context = Regs(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pdptrs=regs.pdptrs, pkrs=regs.pkrs)
    return context if regs.second_stage is None else (context, _stage_of(regs.second_stage))


def _stage_of(stage: TraceStage) -> Stage:
    """Return a second stage of a header as the walks take it."""
    given = stage.given()
    try:
        return Npt(**given) if "ncr3" in given else Ept(**given)
    except ValueError as error:
        raise TraceError(f"header: second_stage: {error}") from None


def plain_contexts(contexts: Sequence[Context]) -> str:
    """Return contexts as the JSON text of a header."""
    def plain(context: Context) -> RegisterSet:
        regs, stage = context if isinstance(context, tuple) else (context, None)
        given = {} if stage is None else {name: value for name, value in vars(stage).items()
                                          if name in TraceStage.__dataclass_fields__ and value is not None}
        return RegisterSet(**registers_of(regs), second_stage=TraceStage(**given) if given else None)

    sets = tuple(map(plain, contexts))
    return Header(registers=sets[:1], contexts=sets).to_json()


def contexts_of(text: str) -> list[Context]:
    """Return the contexts that `plain_contexts()` gave."""
    return [context_of(regs) for regs in Header.from_json(text).contexts]


def pdptrs_at(mem: GuestMemory, cpu: CpuModel, cr3: int, clear: int) -> tuple[int, ...]:
    """Return the PDPTEs at CR3 as the recorded CPU took them, without the bits `clear` that it ignored.

    None is present where there is no legal PDPT (yet): the recorded CPU loaded none then.
    """
    pdptrs = tuple(mem.read_u64(gpa) & ~clear for gpa in pdpte_gpas(cr3))
    try:
        check_pdptrs(cpu, pdptrs)
    except GeneralProtection:
        return (0, 0, 0, 0)
    return pdptrs


def lacks_pdptrs(context: Context) -> bool:
    """True if a context is one of L1 under PAE paging whose PDPTEs are to be loaded from memory."""
    return isinstance(context, Regs) and context.is_pae_paging and context.pdptrs is None


class RegisterEvents:
    """The registers of each vCPU of a trace.

    Parameters
    ----------
    vcpu : Vcpu
        Whose walk takes the register sets; nothing is loaded into it.
    registers : ReplayRegisters
        Those of the loop of rows.
    sets : sequence of Context
        That SET_REGS, VMENTER and VMEXIT name.
    pdpte_clear : int
        Bits that the recorded CPU ignored in PDPTEs.
    """

    def __init__(self, vcpu: Vcpu, registers: ReplayRegisters, sets: Sequence[Context], pdpte_clear: int) -> None:
        self.sets, self._clear = sets, pdpte_clear
        self._walk, self._mem, self._cpu, self._registers = vcpu.gva_walk, vcpu.mem, vcpu.cpu, registers
        self._by_number: list[tuple[Context, RegisterSets]] = []
        self._numbers: dict[Context, int] = {}
        self._most = max(_SETS, 3 * registers.vcpus)
        self._pdpt: int | None = None                   # that the last event loaded
        self.seen: set[Context] = set()                 # contexts so far, up to a number of them

    def context(self, vcpu: int) -> Context:
        """Return the registers of a vCPU."""
        number = self._registers.in_force(vcpu)
        return self.context_at(0 if number is None else number)

    def context_at(self, number: int) -> Context:
        """Return the register set with a number of the loop's."""
        return self._by_number[number][0]

    def nested_stage(self, vcpu: int) -> Stage | None:
        """Return the second stage of the nested guest that ran last on a vCPU."""
        number = self._registers.nested_last(vcpu)
        context = None if number is None else self.context_at(number)
        return context[1] if isinstance(context, tuple) else None

    def enter(self, vcpu: int, context: Context) -> None:
        """Put registers in force on a vCPU; PDPTEs that they do not have are loaded from memory."""
        self._make_room()
        self._registers.use(vcpu, self._number_of(self.with_pdptrs(context)))

    def carry_out(self, vcpu: int, op: Op, value: int) -> None:
        """Do what a register event does, and let the loop do the same from now on.

        Raises
        ------
        GuestFault, ValueError
            No CPU does that.
        """
        self._make_room()
        number, before = self._registers.in_force(vcpu), self.context(vcpu)
        assert number is not None
        self._pdpt = None
        after = self.with_pdptrs(self.sets[value], before) if op in _NAMED else self._loaded(before, op, value)
        to = self._number_of(after)
        if _lasts(after):
            self._registers.remember(number, int(op), value, to, self._pdpt)
        self._registers.use(vcpu, to)

    def saved(self) -> dict[str, Any] | None:
        """Return the registers in force, those of the nested guests that ran last, and those seen, as plain data for JSON.

        None while PDPTEs that were loaded through a second stage are among them: what they were is not known.
        """
        contexts: dict[Context, int] = {}

        def number(context: Context | None) -> int | None:
            return None if context is None else contexts.setdefault(context, len(contexts))

        vcpus = range(self._registers.vcpus)
        nested = [self._registers.nested_last(vcpu) for vcpu in vcpus]
        plain = {"in_force": [number(self.context(vcpu)) for vcpu in vcpus], "seen": [number(context) for context in self.seen],
                 "nested_last": [number(None if last is None else self.context_at(last)) for last in nested]}
        if not all(_lasts(context) for context in contexts):
            return None
        return plain | {"contexts": plain_contexts(list(contexts))}

    def restore(self, plain: dict[str, Any]) -> None:
        """Put the registers in force that `saved()` told.

        Raises
        ------
        ValueError, TypeError, LookupError
            They are of no replay like this.
        """
        contexts = contexts_of(plain["contexts"])
        vcpus = self._registers.vcpus
        if len(plain["in_force"]) != vcpus or len(plain["nested_last"]) != vcpus or len(plain["seen"]) > _SETS:
            raise ValueError(f"registers of {len(plain['in_force'])} vCPUs, the trace has {vcpus}")
        for vcpu, (nested, now) in enumerate(zip(plain["nested_last"], plain["in_force"], strict=True)):
            for number in (nested, now):
                if number is not None:
                    self.enter(vcpu, contexts[number])
        self.seen = {contexts[number] for number in plain["seen"]}

    def with_pdptrs(self, context: Context, before: Context | None = None) -> Context:
        """Return a context of L1 under PAE paging with its PDPTEs: those in force if CR3 stays, else from memory now."""
        if isinstance(context, tuple) or not lacks_pdptrs(context):
            return context
        if isinstance(before, Regs) and before.is_pae_paging and before.cr3 == context.cr3:
            return replace(context, pdptrs=before.pdptrs)
        self._pdpt = pdpte_gpas(context.cr3)[0]
        return replace(context, pdptrs=pdptrs_at(self._mem, self._cpu, context.cr3, self._clear))

    def _loaded(self, context: Context, op: Op, value: int) -> Context:
        """Return a context after a register load by the guest."""
        regs, stage = context if isinstance(context, tuple) else (context, None)
        if op == Op.WRMSR_EFER:
            after = after_wrmsr_efer(self._cpu, regs, value)
        elif op == Op.WRPKRU:
            after = after_wrpkru(regs, value)
        elif op == Op.WRMSR_PKRS:
            after = after_wrmsr_pkrs(self._cpu, regs, value)
        elif op == Op.MOV_CR3:                          # by far the most; whether it may be is asked when it is prepared
            after = replace(regs, cr3=value & ~CR3_NOFLUSH if regs.cr4 & Cr4.PCIDE else value, pdptrs=None)
        else:
            space = _NoPdptrs()                         # they are loaded below, as the recorded CPU did it
            after = after_mov_cr(self._cpu, regs, 0 if op == Op.MOV_CR0 else 4, value, space)
            if space.used:
                after = replace(after, pdptrs=None)
        return (after, stage) if stage is not None else self.with_pdptrs(after)

    def _number_of(self, context: Context) -> int:
        """Return the number of a context in the loop, where it is prepared now if it is not there yet."""
        number = self._numbers.get(context) if _lasts(context) else None
        if number is None:
            number = self._add(context, self._walk.prepare([context]))
        if len(self.seen) < _SETS:
            self.seen.add(context)
        return number

    def _add(self, context: Context, prepared: RegisterSets) -> int:
        number = self._registers.add(prepared)
        self._by_number.append((context, prepared))
        if _lasts(context):
            self._numbers[context] = number
        return number

    def _make_room(self) -> None:
        """Drop the register sets that no vCPU needs if there are many."""
        registers = self._registers
        if registers.count < self._most:
            return
        needed = [(vcpu, self._by_number[number]) for vcpu in range(registers.vcpus)
                  for number in (registers.nested_last(vcpu), registers.in_force(vcpu)) if number is not None]
        registers.drop_all()
        self._by_number, self._numbers = [], {}
        for vcpu, (context, prepared) in needed:
            number = self._numbers.get(context)
            registers.use(vcpu, self._add(context, prepared) if number is None else number)


def _lasts(context: Context) -> bool:
    """True if a context is prepared once for all. PDPTEs of L2 are loaded through the second stage, each time anew."""
    return not isinstance(context, tuple) or not context[0].is_pae_paging


class _NoPdptrs:
    """Memory for a register load whose PDPTEs are not looked at: it remembers that they were asked for."""

    def __init__(self) -> None:
        self.used = False

    def is_backed(self, gpa: int, n: int) -> bool:
        self.used = True
        return True

    def read_u64(self, gpa: int) -> int:
        self.used = True
        return 0
