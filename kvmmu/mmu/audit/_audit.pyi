from collections.abc import Set

from kvmmu.mmu.kvm._state import Kvm

def audit(machine: Kvm, guest_tables: bool = False, logged: Set[tuple[int, int]] = ...) -> list[str]: ...
