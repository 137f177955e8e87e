"""Use the extension that setup.py beside this file builds."""

import walk_cython

import kvmmu

mem = kvmmu.GuestMemory(1 << 20)
for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3010, 0x6007), (0x6000, 0x4067), (0x6008, 0x5005)):
    mem.write_u64(gpa, entry)
vcpu = kvmmu.Vcpu(mem)
vcpu.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
print(f"{walk_cython.count_mapped(kvmmu.Walker(vcpu.gva_walk), 0x400000, 512)} of 512 pages are mapped for user code")
