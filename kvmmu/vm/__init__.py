"""The virtual machine, its vCPUs, and their tracepoints."""
# Below: arch, memory, walk, tlb, mmu, machine
# Order: locked, tracepoints, virtual_machine, guest_state, guest_accesses, vmx_operands, vcpu
