"""Oracles for differential runs: other implementations of the x86 MMU, and the machine here in the form of their answers."""
# Below: arch, vm, kvmmu
# Order: ioctls, guest_stub, events, vmm_memory, operations, scenario_file, comparison, scenario, kvm, live_machine

from kvmmu.oracles.scenario import run_scenario

__all__ = ["run_scenario"]
