"""Kvm: the state of one virtual machine as a Python object."""

from kvmmu.mmu._kvm_memory cimport KvmMemory


cdef class Kvm(KvmMemory):
    """All of one virtual machine but its vCPUs. Made by a Vm."""
