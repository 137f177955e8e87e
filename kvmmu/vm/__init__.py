"""The virtual machine, its vCPUs, and their tracepoints."""
# Below: arch, memory, walk, tlb, mmu, machine
# Order: locked, tracepoints, guest_state, snapshot, virtual_machine, guest_accesses, vmx_operands, vcpu
