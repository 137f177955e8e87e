"""Comparison: one trace under many MMU designs, and what each of them costs."""
# Below: arch, memory, tables, tlb, mmu, vm, traces, replay, report, kvmmu
# Order: design, cost, first_touches, registers, spaces, passes, machines, comparison, distributed, compare
