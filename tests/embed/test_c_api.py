# SPDX-License-Identifier: Apache-2.0
"""kvmmu.h: the header, the function table, its answers, and the programs of examples/embed."""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import c_table
import numpy as np
import pytest
from batch_machines import random_machine
from c_table import WORD, CallFailed, Cpu, Machine, Registers, Table, bytes_of, copy_of
from paths import ROOT

import kvmmu
import kvmmu.embed.c_api
from kvmmu import Acc, Access, GuestMemory, Status, Vcpu

HEADER = ROOT / "kvmmu" / "include" / "kvmmu" / "kvmmu.h"
EXAMPLES = ROOT / "examples" / "embed"
PACKAGE = str(Path(kvmmu.__file__).parents[1])
WARNINGS = ["-Wall", "-Wextra", "-pedantic", "-Werror"]
COLUMNS = ("gpa", "status", "error_code", "level")
MODES = ("32", "pae", "4l", "5l")
PYTHON_HEADERS = ["-isystem", sysconfig.get_path("include")]
E_MEMORY = -6


def compiler(name):
    """The command of a compiler, or a skip."""
    if name == "cc":
        name = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[-1]
    if shutil.which(name) is None:
        pytest.skip(f"the compiler {name} is not installed")
    return name


def python_headers():
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("the headers of Python are not installed")
    return PYTHON_HEADERS


def run(*command, **options):
    """The output of a command that succeeds."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(script, cwd=EXAMPLES):
    return run(sys.executable, script, cwd=cwd, env={**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGE, str(EXAMPLES)])})


def numbers_of_header():
    """Every KVMMU_* that is a number, by its name, from the text."""
    found = {}
    for name, text in re.findall(r"^#define (KVMMU_\w+) \(?(-?\d+)u?\)?(?:\s|$)", HEADER.read_text(), re.MULTILINE):
        found[name] = int(text)
    return found


# ---- the header ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", ["with Python", "without Python"])
@pytest.mark.parametrize(("name", "language"), [("cc", "c"), ("gcc", "c"), ("clang", "c"), ("g++", "c++"), ("clang++", "c++")])
@pytest.mark.parametrize("standard", ["first", "last"])
def test_header_compiles_without_warnings(name, language, standard, source, tmp_path):
    """C99 and C++11, and the newest that compilers know; every name begins with kvmmu_ or KVMMU_."""
    versions = {"c": ("c99", "c2x"), "c++": ("c++11", "c++20")}[language]
    file = tmp_path / ("a.c" if language == "c" else "a.cc")
    file.write_text("#include <Python.h>\n" * (source == "with Python") + "#include <kvmmu/kvmmu.h>\n" * 2 +
                    "int use(void);\nint use(void)\n{\nkvmmu_result result;\nreturn kvmmu_translate(1, 2, 0, &result);\n}\n")
    headers = python_headers() if source == "with Python" else []
    run(compiler(name), f"-std={versions[standard == 'last']}", *WARNINGS, "-fsyntax-only", file, f"-I{kvmmu.get_include()}",
        *headers)


def test_names_have_the_prefix():
    """Of macros, types, functions and members of enumerations."""
    code = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    names = re.findall(r"^#define (\w+)", code, re.MULTILINE) + re.findall(r"^\} (\w+);|^typedef \w+ (\w+);", code, re.MULTILINE)
    names = [name if isinstance(name, str) else name[0] or name[1] for name in names]
    names += re.findall(r"^static (?:inline )?(?:const )?(?:\w+ \**)(\w+)", code, re.MULTILINE)
    assert len(names) > 60
    assert [] == [name for name in names if not name.startswith(("kvmmu_", "KVMMU_"))]


def test_numbers_are_those_of_python():
    """Accesses, statuses and rights of the header are the members of the Python enumerations."""
    numbers = numbers_of_header()
    for prefix, enum in (("KVMMU_ACCESS_", Access), ("KVMMU_STATUS_", Status), ("KVMMU_RIGHT_", Acc)):
        mine = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
        assert len(mine) >= 3
        for name, value in mine.items():
            if name != "NO_AD":
                assert enum[name] == value, name
    assert numbers["KVMMU_ACCESS_NO_AD"] == 0x100
    codes = sorted(value for name, value in numbers.items() if name.startswith("KVMMU_E_"))
    assert list(range(-11, 0)) == codes
    api = c_table.load()
    assert len({api.error_text(code) for code in (0, *codes)}) == 12
    assert b"no code" in api.error_text(1)
    assert api.error_text(-12) == api.error_text(1)


def test_structures_have_the_layout_of_ctypes(tmp_path):
    """Sizes and offsets in C are those that a ctypes program computes."""
    expected = {}
    for name, kind in c_table.STRUCTURES.items():
        expected[f"sizeof({name})"] = ctypes.sizeof(kind)
        for field in kind._fields_:
            expected[f"offsetof({name}, {field[0].rstrip('_')})"] = getattr(kind, field[0]).offset
    lines = [f'printf("%zu\\n", {expression});' for expression in expected]
    (tmp_path / "a.c").write_text("#include <stdio.h>\n#include <kvmmu/kvmmu.h>\nint main(void)\n{\n" + "\n".join(lines) +
                                  "\nreturn 0;\n}\n")
    run(compiler("cc"), tmp_path / "a.c", f"-I{kvmmu.get_include()}", "-o", tmp_path / "a")
    assert expected == dict(zip(expected, map(int, run(tmp_path / "a").split()), strict=True))
    assert ctypes.sizeof(c_table.walk_ctypes.Api) == c_table.load().size


# ---- the examples --------------------------------------------------------------------------------------------------------

def run_c(text, name, standard, tmp_path):
    """The output of a program that embeds the interpreter; compiled without warnings."""
    library = sysconfig.get_config_var("LDLIBRARY") or ""
    folders = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL")]
    folder = next((folder for folder in folders if folder and Path(folder, library).exists()), None)
    if not library or folder is None:
        pytest.skip(f"this Python has no library to embed ({library or 'none'})")
    words = [*python_headers(), f"-I{kvmmu.get_include()}", Path(folder, library), f"-Wl,-rpath,{folder}", "-pthread",
             *shlex.split(sysconfig.get_config_var("LIBS") or ""), *shlex.split(sysconfig.get_config_var("SYSLIBS") or "")]
    source = tmp_path / ("walk.c" if standard == "c99" else "walk.cc")
    source.write_text(text)
    run(compiler(name), f"-std={standard}", *WARNINGS, "-D_POSIX_C_SOURCE=200809L", source, *words, "-o", tmp_path / "walk")
    paths = [PACKAGE, *(path for path in sys.path if path.endswith("site-packages"))]
    return run(tmp_path / "walk", env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHOME": sys.base_prefix})


@pytest.mark.parametrize(("name", "standard"), [("cc", "c99"), ("g++", "c++11")])
def test_c_program(name, standard, tmp_path):
    """A program in plain C starts the interpreter once and walks, also in threads."""
    out = run_c((EXAMPLES / "walk.c").read_text(), name, standard, tmp_path)
    assert out.splitlines() == [
        "0x400123 -> 0x4123", "0x401123 -> status 1, error code 0x7", "0x900000000000 -> status 2, error code 0",
        "page of 4096 bytes, rights 13, accessed 0",
        "level 4: entry 0 at 0x1000 is 0x2027", "level 3: entry 0 at 0x2000 is 0x3027",
        "level 2: entry 2 at 0x3010 is 0x6027", "level 1: entry 1 at 0x6008 is 0x5005", "status 0", "status 0", "status 1",
        "two threads: 200000 translations", "0x400123 -> 0x4123 -> 0x84123",
        "0x401123 -> exit reason 48, qualification 0x7aa, guest-physical address 0x5123"]


def test_the_gil_exceptions_and_the_end_of_the_interpreter(tmp_path):
    """Calls work with the GIL and without it, leave the caller's exception alone, and have a code after Py_Finalize()."""
    assert "done\n" == run_c((ROOT / "tests" / "embed" / "lifetimes.c").read_text(), "cc", "c99", tmp_path)


def test_program_of_the_documentation(tmp_path):
    """The C program of docs/embedding.md, as C and as C++."""
    text = (ROOT / "docs" / "embedding.md").read_text()
    block, = re.findall(r"^```c\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "gpa 0x412345\nstatus 1, error code 0x7\n" == run_c(block, "cc", "c99", tmp_path)
    assert "gpa 0x412345\nstatus 1, error code 0x7\n" == run_c(block, "g++", "c++11", tmp_path)


def test_ctypes_program():
    assert ["0x400123 -> 0x4123", "0x401123 -> status 1, error code 0x7"] == example("walk_ctypes.py").splitlines()


def test_cffi_program():
    pytest.importorskip("cffi", reason="cffi is not installed")
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    python_headers()
    compiler("cc")
    assert "2 of 512 pages are mapped for user code\n" == example("walk_cffi.py")


def test_numba_program():
    pytest.importorskip("numba", reason="Numba is not installed")
    assert "2 of 512 pages are mapped for user code\n" == example("walk_numba.py")


def test_cython_program(tmp_path):
    pytest.importorskip("Cython", reason="Cython is not installed")
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    python_headers()
    compiler("cc")
    for name in ("setup.py", "walk_cython.pyx", "walk_cython_main.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, env={**os.environ, "PYTHONPATH": PACKAGE})
    assert "2 of 512 pages are mapped for user code\n" == example("walk_cython_main.py", tmp_path)


# ---- its answers ---------------------------------------------------------------------------------------------------------

def twin(seed, mode, *, callbacks=False, **options):
    """A Python vCPU over random tables, the same behind handles, addresses and accesses."""
    vcpu, gva, access = random_machine(seed, mode)
    regs = {name: getattr(vcpu.regs, name) for name in ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")}
    cpu = Cpu(40, 0)
    return vcpu, Machine(copy_of(vcpu.mem), regs, cpu=cpu, callbacks=callbacks, **options), gva, access


def assert_equal(expected, found):
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(expected, name), getattr(found, name), err_msg=name)


def in_order(walk, gva, access):
    """The columns of a call for each row: accessed and dirty bits take effect in order."""
    rows = [walk.translate(gva[i:i + 1], access[i:i + 1], fields=COLUMNS) for i in range(gva.size)]
    return {name: np.concatenate([getattr(row, name) for row in rows]) for name in COLUMNS}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("callbacks", [False, True])
def test_translations_are_those_of_python(mode, callbacks):
    """Every row, and the bits left in memory, over slots and over callbacks; one call for each row, and one for all."""
    rows = 600 if callbacks else 2000
    for seed in range(2):
        vcpu, one, gva, access = twin(seed, mode, callbacks=callbacks)
        _, many, _, _ = twin(seed, mode, callbacks=callbacks)
        gva, access = gva[:rows], access[:rows]
        before = bytes_of(one.slots)
        expected = vcpu.gva_walk.translate(gva, access, fields=COLUMNS, set_ad=False)
        assert len(set(expected.status.tolist())) > 1
        assert_equal(expected, one.translate(gva, access, flags=0x100))
        assert_equal(expected, many.translate_many(gva, access, flags=0x100))
        assert before == bytes_of(one.slots) == bytes_of(many.slots)
        expected = in_order(vcpu.gva_walk, gva, access)
        for machine, found in ((one, one.translate(gva, access)), (many, many.translate_many(gva, access))):
            for name in COLUMNS:
                np.testing.assert_array_equal(expected[name], getattr(found, name), err_msg=name)
            assert bytes_of(copy_of(vcpu.mem)) == bytes_of(machine.slots)
        assert before != bytes_of(one.slots)
        one.close()
        many.close()


@pytest.mark.parametrize("callbacks", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "off"])
def test_lookups_and_records_are_those_of_python(mode, callbacks):
    """Size, rights, key and bits of the leaf, with and without rights; every entry of a walk."""
    vcpu, machine, gva, access = twin(3, "4l" if mode == "off" else mode, callbacks=callbacks)
    if mode == "off":
        vcpu.set_regs(cr0=1, cr4=0, efer=0)
        machine.load(cr0=1)
    found = {"probe": 0, "access": 0}
    for address, how in zip(gva[:400].tolist(), access[:400].tolist(), strict=True):
        record, mine = vcpu.gva_walk.walk_record(address, how), machine.record(address, how)
        assert (record.status, record.error_code, record.level) == (mine.end.status, mine.end.error_code, mine.end.level)
        assert [(step.level, step.index, step.gpa, step.entry, step.access) for step in record.steps] == [
            (step.level, step.index, None if step.entry_gpa == 2**64 - 1 else step.entry_gpa, step.entry, step.rights)
            for step in mine.steps[:mine.count]]
        for kind, asked in (("probe", Access.PROBE), ("access", how)):
            mine = machine.lookup(address, int(asked))
            try:
                expected = vcpu.gva_walk.lookup(address, asked)
            except kvmmu.GuestFault as fault:
                assert mine.status != Status.OK
                assert (0, 2**64 - 1, fault.error_code) == (mine.size, mine.gpa, mine.error_code)
                continue
            assert mine.status == Status.OK
            assert (expected.gpa, expected.size, expected.pte_access, expected.accessed, expected.dirty, expected.global_,
                    expected.pkey) == (mine.gpa, mine.size, mine.rights, mine.accessed, mine.dirty, mine.global_, mine.pkey)
            found[kind] += 1
    assert found["probe"] >= found["access"] > 0
    machine.close()


def test_registers():
    """What is loaded is in force, quickly or not; PDPTEs are loaded from memory or given; AC counts."""
    ram = np.zeros(1 << 17, np.uint64)
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3010, 0x6007), (0x6000, 0x4067), (0x7000, 0x2007), (0x8000, 0x3001),
                       (0x8008, 0x3201), (0x9000, 0x3001)):
        ram[gpa // 8] = entry
    machine = Machine([(0, ram.view(np.uint8))], {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00})
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    machine.load(cr0=0x80010001, cr3=0x5000, cr4=0x20, efer=0xD00)
    assert Status.PAGE_FAULT == machine.lookup(0x400000, 0).status
    machine.load(cr0=0x80010001, cr3=0x7000, cr4=0x20, efer=0xD00)
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    machine.load(cr0=0x80010001, cr3=0x1000, cr4=0x200020, efer=0xD00)                      # SMAP
    assert 1 == machine.lookup(0x400000, 0).error_code
    machine.load(cr0=0x80010001, cr3=0x1000, cr4=0x200020, efer=0xD00, rflags=1 << 18)
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    machine.load(cr0=0x80010001, cr3=0x8000, cr4=0x20)                                      # PAE
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    ram[0x8000 // 8] = 0                                                                    # registers keep it
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    machine.load(cr0=0x80010001, cr3=0x8000, cr4=0x20, pdptrs=(0x3001, 0, 0, 0))
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    machine.load(cr0=0x80010001, cr3=0x8000, cr4=0x20)
    assert Status.PAGE_FAULT == machine.lookup(0x400000, 0).status
    found = Registers(size=ctypes.sizeof(Registers))
    machine.table.get_registers(machine.vcpu, ctypes.byref(found))
    assert (0x80010001, 0x8000, 0x20, 0, [0, 0x3201, 0, 0], 1) == (
        found.cr0, found.cr3, found.cr4, found.efer, list(found.pdptrs), found.flags)
    machine.close()


def test_processor_models():
    """Width, vendor and features are those that CpuModel has."""
    mem = GuestMemory(1 << 20)
    for gpa, entry in ((0x1000, 0x2107), (0x2000, 0x40000087), (0x2008, 0x3007 | 1 << 41)):     # bit 8 of a PML4E; a 1G page
        mem.write_u64(gpa, entry)
    regs = {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
    seen = set()
    for flags, width, options in ((0, 0, {}), (1, 0, {"vendor": "amd"}), (4, 0, {"gbpages": False}), (0, 40, {"maxphyaddr": 40})):
        machine = Machine(copy_of(mem), regs, cpu=Cpu(width, flags))
        vcpu = Vcpu(mem, kvmmu.CpuModel(**options))
        vcpu.set_regs(**regs)
        codes = []
        for gva in (0, 1 << 30):
            expected, mine = vcpu.gva_walk.walk_record(gva), machine.lookup(gva, 0x100)
            assert (expected.status, expected.error_code) == (mine.status, mine.error_code)
            codes.append(mine.error_code)
        seen.add(tuple(codes))
        machine.close()
    assert len(seen) == 4
    for flag, bit in ((16, {"cr4": 1 << 12}), (32, {"efer": 0x800}), (64, {"cr4": 1 << 20}), (128, {"cr4": 1 << 21}),
                      (256, {"cr4": 1 << 22}), (512, {"cr4": 1 << 17})):
        registers = {name: regs[name] & ~0x800 if name == "efer" else regs[name] for name in regs}
        machine = Machine(copy_of(mem), registers, cpu=Cpu(0, flag))
        with pytest.raises(CallFailed, match="-8"):
            machine.load(**{name: registers[name] | bit.get(name, 0) for name in registers})
        machine.close()


def test_features_of_processor_models():
    """Every feature has a flag without which its bit is legal, and a strict model has only what it names."""
    regs = {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
    ram = [(0, np.zeros(1 << 16, np.uint8))]
    for flag, bits in ((1024, {"cr4": 1 << 28}), (1024, {"cr3": 1 << 61}), (1024, {"cr3": 1 << 62}), (2048, {"cr4": 1 << 23}),
                       (4096, {"cr4": 1 << 24}), (8192, {"cr4": 1 << 27}), (16384, {"efer": 1 << 20})):
        more = {name: regs[name] | bits.get(name, 0) for name in regs}
        machine = Machine(ram, more)
        machine.close()
        machine = Machine(ram, regs, cpu=Cpu(flags=flag))
        with pytest.raises(CallFailed, match="-8"):
            machine.load(**more)
        machine.close()
    numbers = numbers_of_header()
    for name, (vendors, bit) in kvmmu.arch.registers.FEATURES.items():
        feature = numbers[f"KVMMU_FEATURE_{name.upper()}"]
        register = "cr4" if isinstance(bit, kvmmu.Cr4) else "efer"
        more = regs | {register: regs[register] | int(bit)}
        for vendor in vendors:
            amd = int(vendor == "amd")
            machine = Machine(ram, more, cpu=Cpu(flags=amd))
            machine.close()
            machine = Machine(ram, more, cpu=Cpu(flags=amd | 32768, features=feature))
            machine.close()
            machine = Machine(ram, regs, cpu=Cpu(flags=amd | 32768))
            with pytest.raises(CallFailed, match="-8"):
                machine.load(**more)
            machine.close()


def test_a_processor_model_of_version_1_0():
    """A structure that ends with its flags has neither an encryption bit nor features."""
    table, memory, vcpu = Table(), WORD(), WORD()
    table.memory_create(ctypes.byref(memory))
    cpu = Cpu(40, 0, c_bit=7, features=0xFFFFFFFF)
    with pytest.raises(CallFailed, match="-2"):
        table.vcpu_create(memory, ctypes.byref(cpu), ctypes.byref(vcpu))
    cpu.size = 12
    table.vcpu_create(memory, ctypes.byref(cpu), ctypes.byref(vcpu))
    table.vcpu_free(vcpu)
    for size in (8, 16, 24):
        cpu.size = size
        with pytest.raises(CallFailed, match="-10"):
            table.vcpu_create(memory, ctypes.byref(cpu), ctypes.byref(vcpu))
    table.memory_free(memory)


def test_pages_behind_callbacks_are_kept():
    """Each is read once; what the target changes counts after invalidate(); few stay when there is no room."""
    _, machine, gva, access = twin(1, "4l", callbacks=True, cache_pages=64)
    machine.translate(gva[:50], access[:50])
    assert len(machine.reads) == len(set(machine.reads)) > 3
    machine.translate(gva[:50], access[:50])
    assert len(machine.reads) == len(set(machine.reads))
    assert machine.writes
    machine.close()
    mem = GuestMemory(4 << 20)
    tables = kvmmu.PageTables(mem, mode="4l")
    gva = np.arange(200, dtype=np.uint64) << np.uint64(21)
    for address in gva.tolist():
        tables.map(address, 0x123000)
    regs = {name: getattr(tables.regs(), name) for name in ("cr0", "cr3", "cr4", "efer")}
    machine = Machine(copy_of(mem), regs, callbacks=True, cache_pages=64)
    for _ in range(2):
        assert {0x123000} == set(machine.translate_many(gva, np.zeros(200, np.uint8)).gpa.tolist())
    assert 400 <= len(machine.reads) > len(set(machine.reads))          # each leaf table was forgotten, and read again
    machine.slots[0][1][:] = 0
    machine.table.invalidate(machine.vcpu, 0, 0)
    assert Status.PAGE_FAULT == machine.lookup(0, 0).status
    machine.close()
    _, read_only, gva, access = twin(1, "4l", callbacks=True, write=False)
    before = bytes_of(read_only.slots)
    assert_equal(random_machine(1, "4l")[0].gva_walk.translate(gva[:300], access[:300], fields=COLUMNS, set_ad=False),
                 read_only.translate(gva[:300], access[:300]))
    assert before == bytes_of(read_only.slots)
    read_only.close()


def test_entries_of_four_bytes_are_written_alone():
    """A bit that is set in a 2-level table is a store of four bytes, elsewhere of eight."""
    for mode, size in (("32", 4), ("4l", 8)):
        _, machine, gva, access = twin(0, mode, callbacks=True)
        machine.translate(gva[:600], access[:600])
        assert {size} == {n for _, n in machine.writes}
        machine.close()


def test_misuse(tmp_path):
    """Null pointers, wrong versions, failing and lying callbacks, stale handles, and threads give codes."""
    run(compiler("cc"), "-std=gnu99", *WARNINGS, "-O1", "-shared", "-fPIC", "-pthread", ROOT / "tests" / "embed" / "misuse.c",
        f"-I{kvmmu.get_include()}", "-o", tmp_path / "misuse.so")
    library = ctypes.CDLL(str(tmp_path / "misuse.so"))
    library.misuse.argtypes = [ctypes.c_void_p]
    for _ in range(5):
        assert 0 == library.misuse(kvmmu.embed.c_api.address), "the line in misuse.c"


def test_many_handles():
    """Places are used again: there is no end to memories and vCPUs that come and go, and an end to those that stay."""
    table, ram = Table(), np.zeros(4096, np.uint8)
    memory, seen = ctypes.c_uint64(), set()
    for _ in range(100):
        table.memory_create(ctypes.byref(memory))
        table.memory_add(memory, 0, ram.ctypes.data, 4096, 0)
        seen.add(memory.value)
        table.memory_free(memory)
    assert len(seen) == 100
    memories = []
    while (code := table.api.memory_create(ctypes.byref(memory))) == 0:
        memories.append(memory.value)
    assert E_MEMORY == code
    assert 60000 < len(memories) < 1 << 16
    for number in memories:
        table.memory_free(number)
