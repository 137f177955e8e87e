# SPDX-License-Identifier: Apache-2.0
"""A kernel of ours under Unicorn with kvmmu as its MMU, and under a live KVM; and small programs on the way to a fault."""

import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import guest_kernel
import numpy as np
import pytest
from guest_kernel import (
    BASE,
    CODE,
    GDT,
    HANDLERS,
    IDT,
    RAM_SIZE,
    REGISTERS,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER,
    LiveRun,
    fault_log,
    reports,
)
from paths import ROOT

from kvmmu import CpuModel, GuestMemory
from kvmmu.embed.instructions import writes_what_it_reads

unicorn = pytest.importorskip("unicorn", minversion="2.1", reason="Unicorn 2.1 is not installed")
x86 = pytest.importorskip("unicorn.x86_const")
embed = pytest.importorskip("kvmmu.embed.unicorn")

# (vector, CR2, error code, RIP) of every fault of the kernel; on a live KVM they are the same.
HEAP, COW = 0x40000000, 0x80000000
FAULTS = [
    (14, HEAP + 0x1F008, 2, 0x8055), (14, COW + 0x3010, 3, 0x8061),
    *((14, HEAP + 0x1008 * page + 8, 6, 0xA00A) for page in range(8)),
    *((14, HEAP + 0x1000 * page, 4, 0xA01F) for page in range(8, 12)),
    (14, COW + 0x18, 7, 0xA05B), (14, COW + 0x1018, 7, 0xA063), (14, HEAP + 0x1028, 7, 0xA0BF), (14, HEAP + 0x2018, 4, 0xA0D3),
    (14, HEAP + 0xFFF8, 6, 0xA0D7), (14, 0x8000, 5, 0xA0EF), (14, 0x8000, 7, 0xA0F9), (14, 0xA000, 7, 0xA108),
    (14, 0x8000, 0x15, 0x8000), (14, HEAP + 0x28000, 0x14, HEAP + 0x28000), (14, HEAP + 0x28000, 0x15, HEAP + 0x28000),
    (13, 0, 0, 0xA136), (14, 0xFFFFFFF8, 4, 0xA145), (14, HEAP + 0xCFFB, 6, 0xA14D), (14, HEAP + 0xD000, 6, 0xA14D),
    (14, HEAP + 0x10000, 6, 0xA156), (14, HEAP + 0xE078, 4, 0xA16A)]
# Sum of the shared pages, a word that another page's write left alone, A and D of an entry four times, an empty page, a sum.
REPORTS = [0x444444444444447D, 0x1111111111111126, 0x67, 0x07, 0x27, 0x67, 0, 0x21]
ACCESSED, DIRTY = 0x20, 0x40


def boot(ram, **registers):
    """An emulator at the start of what lies at BASE, at CPL 0."""
    emulator = embed.Emulator(GuestMemory(ram))
    emulator.load(**REGISTERS, **({"rip": BASE, "rsp": STACK + 4096, "rflags": 2} | registers))
    emulator.load_tables(gdt=(GDT, 71), idt=(IDT, 16 * 32 - 1), tss=(TSS, 0x67), tr=TSS_SELECTOR)
    return emulator


def machine(code, *, at=BASE, **registers):
    """(emulator, its memory) of a program at CPL 0. What is delivered to it halts, with the vector in RAX."""
    ram = np.zeros(RAM_SIZE, np.uint8)
    guest_kernel.fill(ram)
    ram[BASE:BASE + 0x4000] = 0xF4
    ram[at:at + len(code)] = np.frombuffer(code, np.uint8)
    for vector in range(32):
        handler = BASE + 0x800 + 16 * vector
        stub = b"\xb8" + struct.pack("<I", vector) + b"\xf4"
        ram[handler:handler + len(stub)] = np.frombuffer(stub, np.uint8)
        set_gate(ram, vector, handler)
    return boot(ram, **registers), ram


def set_gate(ram, vector, handler, *, flags=0x8E, stack=0):
    gate = struct.pack("<HHBBHII", handler & 0xFFFF, CODE, stack, flags, handler >> 16, 0, 0)
    ram[IDT + 16 * vector:IDT + 16 * vector + 16] = np.frombuffer(gate, np.uint8)


def word(ram, gpa):
    return int(ram[gpa:gpa + 8].view(np.uint64)[0])


def set_word(ram, gpa, value):
    ram[gpa:gpa + 8].view(np.uint64)[0] = value


def map_page(ram, gva, entry):
    """An entry of the first 2 MiB, which the kernel maps to themselves."""
    set_word(ram, 0x4000 + 8 * (gva >> 12), entry)


# ---- the kernel ----------------------------------------------------------------------------------------------------------

def test_the_image_is_that_of_the_source(tmp_path):
    made = guest_kernel.assemble(tmp_path)
    if made is None:
        pytest.skip("binutils for x86-64 are not installed")
    code, labels = made
    assert code == guest_kernel.image()
    assert {6: labels["system_call"], 13: labels["general_protection"], 14: labels["page_fault"]} == HANDLERS


def test_kernel_under_unicorn():
    """It runs to its end: every fault with its error code and CR2, what its pages hold, and A and D bits."""
    ram = np.zeros(RAM_SIZE, np.uint8)
    guest_kernel.fill(ram)
    emulator = boot(ram)
    assert "halt" == emulator.run(timeout=60)
    assert FAULTS == fault_log(ram)
    assert REPORTS == reports(ram)
    delivered = [(e.vector, e.cr2 or 0, e.error_code, e.rip) for e in emulator.events if e.vector != 6]
    assert FAULTS == delivered
    assert 13 == sum(e.vector == 6 and e.error_code is None for e in emulator.events)
    assert str(len(emulator.events)) in repr(emulator)


def test_kernel_under_live_kvm():
    """The same memory, down to the stack, and the same fault log."""
    try:
        live = LiveRun()
    except OSError as error:
        pytest.skip(f"no live KVM: {error}")
    with live:
        ended = live.run()
        if ended is not None:
            pytest.skip(f"this KVM does not run the kernel to its end: {ended}")
        ram = np.zeros(RAM_SIZE, np.uint8)
        guest_kernel.fill(ram)
        emulator = boot(ram)
        assert "halt" == emulator.run(timeout=60)
        assert fault_log(live.ram) == fault_log(ram)
        assert reports(live.ram) == reports(ram)
        differ = np.flatnonzero(live.ram.view(np.uint64) != ram.view(np.uint64)) * 8
        assert [] == [f"{gpa:#x}: KVM {word(live.ram, gpa):#x}, here {word(ram, gpa):#x}" for gpa in differ.tolist()]


# ---- translations --------------------------------------------------------------------------------------------------------

def test_tables_that_the_guest_edits():
    """A changed entry counts after INVLPG and after MOV to CR3, a new one at once."""
    # mov rax,[0x100000]; mov qword [0x4800],0x102003; (invlpg [0x100000] | mov rcx,cr3; mov cr3,rcx); mov rbx,[0x100000]; hlt
    head, tail = "488b042500001000" "48c7042500480000" "03201000", "488b1c2500001000" "f4"
    for flush in ("0f013c2500001000", "0f20d9" "0f22d9"):
        emulator, ram = machine(bytes.fromhex(head + flush + tail))
        set_word(ram, 0x100000, 0x11)
        set_word(ram, 0x102000, 0x22)
        assert "halt" == emulator.run()
        assert (0x11, 0x22) == (emulator.uc.reg_read(x86.UC_X86_REG_RAX), emulator.uc.reg_read(x86.UC_X86_REG_RBX))
        assert 0x102003 | ACCESSED == word(ram, 0x4800)
        assert [] == emulator.events


def test_invlpg_drops_all_of_a_large_page():
    """Of a 2M page, parts of which are in the TLB: INVLPG of any address on it, with prefixes or not."""
    for invlpg in ("0f013f", "410f0138", "67410f0138"):                             # [rdi], [r8], [r8d]
        # mov rax,[rsi]; mov rax,[rsi+0x5000]; mov qword [0x3008],0x2000e3; invlpg; mov rbx,[rsi+0x5000]; hlt
        code = "488b06" "488b8600500000" "48c7042508300000e3002000" + invlpg + "488b9e00500000" "f4"
        _, low = machine(bytes.fromhex(code))
        ram = np.zeros(2 * RAM_SIZE, np.uint8)
        ram[:RAM_SIZE] = low
        set_word(ram, 0x3008, 0x83)
        set_word(ram, 0x5000 + 0x100, 0xAA)
        set_word(ram, 0x205000 + 0x100, 0xBB)
        emulator = boot(ram, rsi=0x200100, rdi=0x3FF000, r8=0x3FF000)
        assert "halt" == emulator.run()
        assert 0xAA == emulator.uc.reg_read(x86.UC_X86_REG_RAX)
        assert 0xBB == emulator.uc.reg_read(x86.UC_X86_REG_RBX)


def test_accessed_and_dirty_bits():
    """A on a read, D on the first write behind it, none on a write that fails."""
    # mov rax,[rsi]; mov [rsi],rax; mov [rdi],rax
    emulator, ram = machine(bytes.fromhex("488b06" "f4" "488906" "488907" "f4"), rsi=0x100000, rdi=0x101000)
    map_page(ram, 0x101000, 0x101001)
    emulator.run()
    assert 0x100003 | ACCESSED == word(ram, 0x4800)
    assert "halt" == emulator.run()
    assert 0x100003 | ACCESSED | DIRTY == word(ram, 0x4800)
    assert 0x101001 == word(ram, 0x4808)
    assert [(14, 3, 0x101000)] == [(e.vector, e.error_code, e.cr2) for e in emulator.events]
    assert 14 == emulator.uc.reg_read(x86.UC_X86_REG_RAX)
    assert 0x101000 == emulator.uc.reg_read(x86.UC_X86_REG_CR2)


@pytest.mark.parametrize(("code", "registers", "page", "expected"), [
    ("488b06", {"rsi": 0x100ABC}, 0x100000, (14, 0, 0x100ABC)),                     # read
    ("488906", {"rsi": 0x100ABC}, 0x100000, (14, 2, 0x100ABC)),                     # write
    ("480106", {"rsi": 0x100ABC}, 0x100000, (14, 2, 0x100ABC)),                     # add [rsi], rax
    ("483906", {"rsi": 0x100ABC}, 0x100000, (14, 0, 0x100ABC)),                     # cmp [rsi], rax
    ("ffe6", {"rsi": 0x100ABC}, 0x100000, (14, 0, 0x100ABC)),                       # jmp rsi; no NX: no I/D
    ("488b06", {"rsi": 0x100FFC}, 0x101000, (14, 0, 0x101000)),                     # across, the second page
    ("488b06", {"rsi": 0x100FFC}, 0x100000, (14, 0, 0x100FFC)),                     # across, the first
    ("f3a4", {"rsi": 0x102000, "rdi": 0x0FFFF0, "rcx": 0x40}, 0x100000, (14, 2, 0x100000)),     # rep movsb
    ("488b06", {"rsi": 0x8000_0000_0000}, 0x100000, (13, 0, None))])
def test_addresses_of_faults(code, registers, page, expected):
    """CR2 is the whole address, of the second page where that one fails; RIP is that of the instruction."""
    emulator, ram = machine(bytes.fromhex(code) + b"\xf4", **registers)
    emulator.uc.reg_write(x86.UC_X86_REG_MSR, (0xC0000080, 0x500))                  # without NX
    map_page(ram, page, page | 2)
    assert "halt" == emulator.run()
    event, = emulator.events
    assert expected == (event.vector, event.error_code, event.cr2)
    assert event.rip == (registers["rsi"] if code == "ffe6" else BASE)
    assert event.rip == word(ram, STACK + 4096 - 40)                                # on the stack


def test_a_store_across_pages_leaves_no_part():
    """It faults on the second page: nothing of the first one has changed."""
    emulator, ram = machine(bytes.fromhex("488906" "f4"), rsi=0x100FFC, rax=2**64 - 1)
    map_page(ram, 0x101000, 0)
    set_word(ram, 0x100FF8, 0x1122334455667788)
    assert "halt" == emulator.run()
    assert [(14, 2, 0x101000)] == [(e.vector, e.error_code, e.cr2) for e in emulator.events]
    assert 0x1122334455667788 == word(ram, 0x100FF8)


def test_rights_of_modes():
    """SMAP, AC, SMEP, WP and protection keys count as they do for the processor."""
    model = unicorn.x86_const.UC_CPU_X86_BROADWELL
    code = bytes.fromhex("488b06" "f4")
    for cr4, rflags, expected in ((0x20, 2, []), (0x200020, 2, [1]), (0x200020, 0x40002, [])):
        _, ram = machine(code)
        map_page(ram, 0x100000, 0x100007)
        emulator = embed.Emulator(GuestMemory(ram), model=model)
        emulator.load(**REGISTERS | {"cr4": cr4}, rip=BASE, rsp=STACK + 4096, rflags=rflags, rsi=0x100000)
        emulator.load_tables(gdt=(GDT, 71), idt=(IDT, 511), tss=(TSS, 0x67), tr=TSS_SELECTOR)
        set_word(ram, 0x1000, 0x2007)
        assert "halt" == emulator.run()
        assert expected == [e.error_code for e in emulator.events]
    for cr0, expected in ((0x80000033, []), (0x80010033, [3])):
        emulator, ram = machine(bytes.fromhex("488906" "f4"), rsi=0x100000)
        map_page(ram, 0x100000, 0x100001)
        emulator.uc.reg_write(x86.UC_X86_REG_CR0, cr0)
        assert "halt" == emulator.run()
        assert expected == [e.error_code for e in emulator.events]


def test_processor_models():
    """The physical-address width is that of the model: a wider entry has a reserved bit."""
    for width, expected in ((48, []), (36, [9])):
        _, ram = machine(bytes.fromhex("488b06" "f4"))
        map_page(ram, 0x100000, 0x100003 | 1 << 40)
        memory = GuestMemory(ram)
        memory.add_slot(0x100000 | 1 << 40, 4096)
        emulator = embed.Emulator(memory, CpuModel(maxphyaddr=width))
        emulator.load(**REGISTERS, rip=BASE, rsp=STACK + 4096, rflags=2, rsi=0x100000)
        emulator.load_tables(gdt=(GDT, 71), idt=(IDT, 511))
        assert "halt" == emulator.run()
        assert expected == [e.error_code for e in emulator.events]


def test_an_encryption_bit():
    """It is no address bit of the model that has it, and reserved or an address bit of others."""
    for c_bit, expected in ((40, []), (None, [9])):
        _, ram = machine(bytes.fromhex("488b06" "f4"))
        map_page(ram, 0x100000, 0x100003 | 1 << 40)
        emulator = embed.Emulator(GuestMemory(ram), CpuModel(maxphyaddr=36, c_bit=c_bit))
        emulator.load(**REGISTERS, rip=BASE, rsp=STACK + 4096, rflags=2, rsi=0x100000)
        emulator.load_tables(gdt=(GDT, 71), idt=(IDT, 511))
        assert "halt" == emulator.run()
        assert expected == [e.error_code for e in emulator.events]


# ---- delivery ------------------------------------------------------------------------------------------------------------

def test_interrupts_of_software():
    """INT n pushes no error code, and the address behind it; its gate may be closed to users."""
    emulator, _ = machine(bytes.fromhex("cc" "f4"))
    assert "halt" == emulator.run()
    assert [(3, None, BASE + 1)] == [(e.vector, e.error_code, e.rip) for e in emulator.events]
    assert 3 == emulator.uc.reg_read(x86.UC_X86_REG_RAX)
    # a user's INT 0x1e through a gate of DPL 0 (#GP with its number), and of DPL 3: by SYSEXIT to the user's page
    for flags, expected in ((0x8E, (13, 0x1E << 3 | 2, USER)), (0xEE, (0x1E, None, USER + 2))):
        code = bytes.fromhex("b974010000" "b808000000" "31d2" "0f30" "ba00a00000" "480f35")
        emulator, ram = machine(code)
        ram[USER:USER + 2] = (0xCD, 0x1E)
        set_gate(ram, 0x1E, BASE + 0x800, flags=flags)
        assert "halt" == emulator.run()
        assert [expected] == [(e.vector, e.error_code, e.rip) for e in emulator.events]
        assert STACK + 4096 - 40 - 8 * (flags == 0x8E) == emulator.uc.reg_read(x86.UC_X86_REG_RSP)


def test_frame_and_flags():
    """SS, RSP, RFLAGS with RF, CS, RIP, error code on an aligned stack; IF is cleared by an interrupt gate alone."""
    for flags, interrupts in ((0x8E, 0), (0x8F, 0x200)):
        emulator, ram = machine(bytes.fromhex("488b06"), rsi=0x100000, rsp=STACK + 0xFF5, rflags=0x202)
        set_gate(ram, 14, BASE + 0x800, flags=flags)
        map_page(ram, 0x100000, 0)
        assert "halt" == emulator.run()
        top = STACK + 0xFF0
        assert [0, BASE, CODE, 0x10202, STACK + 0xFF5, 0x10] == [word(ram, top - 48 + 8 * i) for i in range(6)]
        assert top - 48 == emulator.uc.reg_read(x86.UC_X86_REG_RSP)
        assert interrupts == emulator.uc.reg_read(x86.UC_X86_REG_EFLAGS) & 0x200


def test_stack_of_an_interrupt():
    """A gate with the number of a stack of the TSS takes that one."""
    emulator, ram = machine(bytes.fromhex("488b06"), rsi=0x100000, rsp=0x123456)
    set_gate(ram, 14, BASE + 0x800, stack=3)
    set_word(ram, TSS + 0x24 + 16, 0x110000)
    map_page(ram, 0x100000, 0)
    assert "halt" == emulator.run()
    assert 0x110000 - 48 == emulator.uc.reg_read(x86.UC_X86_REG_RSP)
    assert 0x123456 == word(ram, 0x110000 - 16)


def test_double_and_triple_faults():
    """A #PF whose stack is missing is a #DF, on a stack of its own; without one, the end."""
    emulator, ram = machine(bytes.fromhex("488b06"), rsi=0x100000, rsp=0x101800)
    for page in (0x100000, 0x101000):
        map_page(ram, page, 0)
    set_gate(ram, 8, BASE + 0x880, stack=1)
    set_word(ram, TSS + 0x24, 0x110000)
    assert "halt" == emulator.run()
    assert [(8, 0)] == [(e.vector, e.error_code) for e in emulator.events]
    assert 0 == word(ram, 0x110000 - 48)
    emulator, ram = machine(bytes.fromhex("488b06"), rsi=0x100000, rsp=0x101800)
    for page in (0x100000, 0x101000):
        map_page(ram, page, 0)
    assert "shutdown" == emulator.run()
    assert [] == emulator.events


@pytest.mark.parametrize(("change", "vector", "error_code"), [
    (lambda ram: set_gate(ram, 14, BASE + 0x800, flags=0x0E), 8, 0),                # not present: #NP, and with #PF before it #DF
    (lambda ram: set_gate(ram, 14, BASE + 0x800, flags=0x85), 8, 0),                # no gate of 64-bit mode
    (lambda ram: ram.__setitem__(slice(GDT + 8, GDT + 16), 0), 8, 0)])
def test_gates_that_cannot_be_taken(change, vector, error_code):
    """They are faults in the delivery of a fault."""
    emulator, ram = machine(bytes.fromhex("488b06"), rsi=0x100000)
    map_page(ram, 0x100000, 0)
    change(ram)
    if word(ram, GDT + 8):
        assert "halt" == emulator.run()
        assert [(vector, error_code)] == [(e.vector, e.error_code) for e in emulator.events]
    else:
        assert "shutdown" == emulator.run()                                         # no code segment for anybody


def test_until():
    """A run ends before an instruction; the next one goes on there."""
    emulator, _ = machine(bytes.fromhex("48ffc0" * 4 + "f4"), rax=5)
    assert "until" == emulator.run(until=BASE + 6)
    assert 7 == emulator.uc.reg_read(x86.UC_X86_REG_RAX)
    assert "halt" == emulator.run()
    assert 9 == emulator.uc.reg_read(x86.UC_X86_REG_RAX)


# ---- its users -----------------------------------------------------------------------------------------------------------

def test_memory_that_is_not_there():
    """An access to a hole of guest memory is Unicorn's error."""
    emulator, ram = machine(bytes.fromhex("488b06"), rsi=0x100000)
    map_page(ram, 0x100000, 0x40000003)
    with pytest.raises(unicorn.UcError):
        emulator.run()


def test_wrong_arguments():
    with pytest.raises(TypeError, match="mem: want a GuestMemory"):
        embed.Emulator(b"")
    with pytest.raises(ValueError, match="read-only"):
        embed.Emulator(GuestMemory(bytes(4096)))
    emulator, _ = machine(b"\xf4")
    with pytest.raises(TypeError, match="nonsense: no such register"):
        emulator.load(**REGISTERS, nonsense=1)
    with pytest.raises(ValueError, match="cr0"):
        emulator.load(**REGISTERS | {"cr0": -1})
    emulator.uc.reg_write(x86.UC_X86_REG_CR3, 1 << 60)
    with pytest.raises(RuntimeError, match="refuses these registers"):
        emulator.run()


def test_threads():
    """One thread at a time, which lets go of it."""
    emulator, _ = machine(b"\x90\xf4")
    assert "halt" == emulator.run()
    with ThreadPoolExecutor(1) as pool:
        emulator.set_pkru(0)
        with pytest.raises(RuntimeError, match="another thread"):
            pool.submit(emulator.run, BASE).result()
        emulator.release()
        assert "halt" == pool.submit(emulator.run, BASE).result()


def test_without_unicorn():
    """The module says how to get it."""
    code = "import sys; sys.modules['unicorn'] = None\nimport kvmmu.embed.unicorn"
    done = subprocess.run([sys.executable, "-Pc", code], capture_output=True, text=True, check=False)
    assert f"{sys.executable} -m pip install 'kvmmu[unicorn]'" in done.stderr


@pytest.mark.parametrize(("code", "expected"), [
    ("0106", True), ("480106", True), ("f0480106", True), ("01c6", False), ("3906", False), ("833e01", False),
    ("830601", True), ("8b06", False), ("8906", False), ("ff06", True), ("ff26", False), ("ff36", False), ("f716", True),
    ("f726", False), ("8706", True), ("0fb106", True), ("0fc106", True), ("0fba2e01", True), ("0fba2601", False),
    ("0fab06", True), ("0fa306", False), ("480fc70e", True), ("0fc736", False), ("c12601", True), ("d326", True), ("a4", False),
    ("", False), ("48", False), ("0f", False), ("66" * 20, False)])
def test_instructions_that_write_what_they_read(code, expected):
    assert expected == writes_what_it_reads(bytes.fromhex(code))


def test_example_of_the_documentation(capsys):
    """The program of docs/embedding.md."""
    block, = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "embedding.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, "embedding.md", "exec"), {})
    assert "Event(vector=14, error_code=2, cr2=1048848, rip=32768)\n" == capsys.readouterr().out
