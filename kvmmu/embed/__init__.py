# SPDX-License-Identifier: Apache-2.0
"""kvmmu inside other programs: the function table for C, and the MMU of an emulator."""
# Below: arch, memory, _walk, walk, kvmmu
# Order: _structs, _page_cache, _vcpus, _lookups, _memories, _registers, c_api, _tlb_fill, instructions, unicorn
