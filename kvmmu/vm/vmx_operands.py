"""The operands of INVEPT and INVVPID, by which L1 invalidates translations of L2's. VMXON is not modelled."""

from kvmmu.arch.faults import InvalidOpcode, VmFail
from kvmmu.arch.registers import CpuModel, is_canonical
from kvmmu.arch.second_stages import Ept

_INVALID_OPERAND = 28                   # VM-instruction error: invalid operand to INVEPT/INVVPID
EPT_CONTEXT, _EPT_GLOBAL = 1, 2
_ADDRESS, _ALL = 0, 2                   # types of INVVPID; 1 a VPID, 3 the same but for global translations


def check_invept(cpu: CpuModel, type: int, eptp: int) -> None:
    """Raise VmFail unless INVEPT takes the operands."""
    if type not in (EPT_CONTEXT, _EPT_GLOBAL) or (type == EPT_CONTEXT and not _is_eptp(cpu, eptp)):
        raise VmFail(f"VMfail: INVEPT type {type}, EPTP {eptp:#x}", number=_INVALID_OPERAND, rule="invept")


def check_invvpid(cpu: CpuModel, type: int, vpid: int, gva: int) -> None:
    """Raise VmFail unless INVVPID takes the operands."""
    if type > 3 or vpid >> 16 or (type != _ALL and vpid == 0) or (type == _ADDRESS and not is_canonical(cpu, gva)):
        raise VmFail(f"VMfail: INVVPID type {type}, VPID {vpid:#x}, address {gva:#x}", number=_INVALID_OPERAND, rule="invvpid")


def check_vmx(cpu: CpuModel, name: str, *, l2_runs: bool, has_it: bool) -> None:
    """Raise unless whoever runs is L1 on a processor that has the instruction."""
    if l2_runs:
        raise ValueError(f"{name.lower()}: L2 runs, whose {name} exits to L1; want leave_nested() before")
    if cpu.vendor != "intel" or not has_it:
        raise InvalidOpcode(f"#UD: {name} on a processor without it", rule=name.lower())


def _is_eptp(cpu: CpuModel, eptp: int) -> bool:
    try:
        Ept(eptp)
    except ValueError:
        return False
    return not eptp & cpu.rsvd_gpa_bits
