from kvmmu.arch.registers import CpuModel
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.kvm._state import Kvm
from kvmmu.tlb._tlb import Tlb
from kvmmu.walk._second_stage import SecondStage

class MachineModes:
    @property
    def kvm(self) -> Kvm: ...
    @property
    def tlb(self) -> Tlb: ...
    def set_cpu(self, cpu: CpuModel) -> None: ...
    def set_mode(self, mem: GuestMemory, *, smm: bool = False, guest_mode: bool = False,
                 second: SecondStage | None = None) -> None: ...
