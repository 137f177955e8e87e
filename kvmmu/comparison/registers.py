"""The registers of a trace's vCPUs followed through its events, without page tables."""

from collections.abc import Hashable
from dataclasses import replace

from kvmmu.arch._bits import CR3_NOFLUSH, Cr4, Op
from kvmmu.arch.registers import Regs
from kvmmu.traces import Header, RegisterSet

__all__ = ["NO_REGISTERS", "Registers"]

_PCID = 0xFFF
NO_REGISTERS = Regs(cr0=0x80000001, cr3=0, cr4=0x20, efer=0xD00)       # 4-level paging, of a trace that tells none
State = tuple[Regs, Hashable]


class Registers:
    """The registers in force on each vCPU, and the second stage that a nested guest runs under, or None."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._contexts = [_state_of(registers) for registers in header.contexts]
        self.states: list[State] = []
        self.restart()

    def restart(self) -> None:
        """Load the registers of the start."""
        self.states = [_state_of(registers) for registers in self._header.registers] or [(NO_REGISTERS, None)]

    def space(self, vcpu: int) -> Hashable:
        """Return what names the address space of a vCPU: its root, and the second stage."""
        regs, stage = self.states[vcpu]
        return regs.cr3 & ~_PCID, stage

    def event(self, op: Op, vcpu: int, value: int) -> None:
        """Carry out a register event of the trace."""
        regs, stage = self.states[vcpu]
        if op == Op.MOV_CR3:
            regs = replace(regs, cr3=value & ~CR3_NOFLUSH if regs.cr4 & Cr4.PCIDE else value, pdptrs=None)
        elif op == Op.MOV_CR0:
            regs = replace(regs, cr0=value)
        elif op == Op.MOV_CR4:
            regs = replace(regs, cr4=value)
        elif op == Op.WRMSR_EFER:
            regs = replace(regs, efer=value | regs.efer & 0x400)       # EFER.LMA is the processor's
        elif op in (Op.SET_REGS, Op.VMENTER, Op.VMEXIT):
            regs, stage = self._contexts[value]
        elif op == Op.RESTART:
            self.restart()
            return
        self.states[vcpu] = regs, stage


def _state_of(registers: RegisterSet) -> State:
    return (Regs(cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer, pkru=registers.pkru,
                 pkrs=registers.pkrs),
            registers.second_stage)
