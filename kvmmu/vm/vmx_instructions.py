# SPDX-License-Identifier: Apache-2.0
"""INVEPT and INVVPID: how L1 invalidates what the processor and KVM remember of L2."""

from abc import ABC, abstractmethod

from kvmmu.arch.arguments import check_word
from kvmmu.arch.faults import InvalidOpcode, VmFail
from kvmmu.arch.registers import CpuModel, Regs, is_canonical
from kvmmu.arch.second_stages import Ept
from kvmmu.machine._machine import Machine
from kvmmu.vm.locked import PartOfMachine, locked

_INVALID_OPERAND = 28                   # VM-instruction error: invalid operand to INVEPT/INVVPID
_EPT_CONTEXT, _EPT_GLOBAL = 1, 2
_ADDRESS, _ALL = 0, 2                   # types of INVVPID; 1 a VPID, 3 the same but for global translations


class VmxInstructions(PartOfMachine, ABC):
    """What a `Vcpu` does for L1. VMXON is not modelled: L1 is in VMX operation as soon as it needs to be."""

    _cpu: CpuModel
    _tdp: str | None
    _l1_regs: Regs | None
    _made: Machine | None

    @abstractmethod
    def _machine(self) -> Machine:
        """Return this vCPU on its host."""

    @locked
    def invept(self, type: int, eptp: int = 0) -> None:
        """INVEPT by L1: 1 what derives from one EPTP, 2 from any.

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
        self._check_vmx("INVEPT", has_it=self._tdp is not None)
        if type not in (_EPT_CONTEXT, _EPT_GLOBAL) or (type == _EPT_CONTEXT and not self._is_eptp(eptp)):
            raise VmFail(f"VMfail: INVEPT type {type}, EPTP {eptp:#x}", number=_INVALID_OPERAND, rule="invept")
        if self._made is not None:
            self._machine().invept(eptp if type == _EPT_CONTEXT else None)

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
        self._check_vmx("INVVPID", has_it=True)
        if type > 3 or vpid >> 16 or (type != _ALL and vpid == 0) or (type == _ADDRESS and not is_canonical(self._cpu, gva)):
            raise VmFail(
                f"VMfail: INVVPID type {type}, VPID {vpid:#x}, address {gva:#x}", number=_INVALID_OPERAND, rule="invvpid")
        if self._made is not None:
            self._machine().invvpid(type, gva)

    def _check_vmx(self, name: str, *, has_it: bool) -> None:
        if self._l1_regs is not None:
            raise ValueError(f"{name.lower()}: L2 runs, whose {name} exits to L1; want leave_nested() before")
        if self._cpu.vendor != "intel" or not has_it:
            raise InvalidOpcode(f"#UD: {name} on a processor without it", rule=name.lower())

    def _is_eptp(self, eptp: int) -> bool:
        try:
            Ept(eptp)
        except ValueError:
            return False
        return not eptp & self._cpu.rsvd_gpa_bits
