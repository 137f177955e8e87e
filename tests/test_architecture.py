# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: who may import whom, and rules of style that a reader relies on."""

import ast
import re
from pathlib import Path

import pytest

import kvmmu

ROOT = Path(__file__).parents[1] / "kvmmu"                               # the sources, not what is installed
# Lowest first; a module imports modules before it.
LAYERS = ("_bits", "_alloc", "_lock", "_maker", "arguments", "locked", "faults", "record", "columns", "_arguments", "_columns",
          "nested", "_roles", "_memory", "registers", "delivery", "control_blocks", "host", "_format", "_gpte", "tables", "_walk",
          "_walk_init", "_plain", "_lanes", "_prefixes", "_verdicts", "_rows", "_straight", "_blocks", "_batch", "_tlb", "mmu",
          "_contexts", "_explain",
          "_pagewalk", "walker", "_machine_state", "_exits", "_access", "_l1_flushes", "_machine_modes", "_machine", "_audit_tlb",
          "tracepoints", "vm", "guest_accesses", "vmx_instructions", "vcpu", "_replay_blocks", "_replay", "outcome", "terminal",
          "progress", "recorded_faults", "trace_memory", "trace_replay", "replay", "report", "recorded_machine", "spt", "figure",
          "cli")
# The same within mmu/.
MMU_LAYERS = ("_spte", "_slots", "_rmap", "_trace", "_kvm", "_page", "_unsync", "_fault", "_tdp", "_tdp_range",
              "_zap", "_shadow_range", "_guest_tables", "_leaf", "_sync", "_shadow", "_roots", "_track",
              "_entry", "_kvm_memory", "_state", "_audit_leaf", "_audit_guest", "_audit_shadow", "_audit", "_inspect", "_damage")
SIDE_ROOMS = ("traces", "oracles", "images", "embed", "data")           # they know nothing of the MMU
USES_TRACES = ("replay", "trace_memory", "trace_replay", "recorded_machine", "cli")
USES_FACE = ("oracles/__init__.py", "oracles/events.py", "oracles/scenario.py", "oracles/vmm_memory.py")     # of the public face
FACE = ("__init__", "__main__")                                         # may import everything
SOURCES = sorted(path for suffix in ("py", "pyx", "pxd") for path in ROOT.rglob(f"*.{suffix}"))
CYTHON = [path for path in SOURCES if path.suffix != ".py"]
IMPORT = re.compile(r"^\s*(?:from\s+(kvmmu[\w.]*)\s+c?import\s+(\(?[^#\n]*)|c?import\s+(kvmmu[\w.]*))", re.MULTILINE)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
each_cython_source = pytest.mark.parametrize("path", CYTHON, ids=lambda path: str(path.relative_to(ROOT)))


def room(path):
    """The module of a file: its stem at the top, its folder below."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path):
    """Modules of the package that a file imports, as first part of the name below kvmmu; "" is the package itself."""
    found = set()
    for source, names, plain in IMPORT.findall(path.read_text()):
        module = source or plain
        parts = module.split(".")[1:]
        if parts:
            found.add(parts[0])
            continue
        submodules = [name.split(" as ")[0].strip(" ()") for name in names.split(",")] if source else []
        submodules = [name for name in submodules if name in LAYERS + SIDE_ROOMS]
        found.update(submodules or [""])
    return found


def code_of(path):
    """The text without comments, docstrings and other string literals."""
    text = re.sub(r'("""|\'\'\').*?\1', "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', '""', text)
    return re.sub(r"#.*", "", text)


def test_the_pattern_of_imports_sees_all_of_them():
    """The regular expression finds what Python's own parser finds."""
    for path in SOURCES:
        if path.suffix != ".py":
            continue
        expected = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            expected |= {name.split(".")[1] for name in names if name and name.startswith("kvmmu.")}
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        assert expected <= imported(path), str(path)


@each_source
def test_imports_run_downward(path):
    """Nothing imports a module above it; the rooms at the side import nothing above arguments."""
    here = room(path)
    if here in FACE:
        return
    assert here in LAYERS + SIDE_ROOMS, f"{here} has no place in the order of layers"
    allowed = {here} | (set(LAYERS[:LAYERS.index(here)]) if here in LAYERS else {"_bits", "arguments"})
    if here in USES_TRACES:
        allowed |= {"traces"}
    if str(path.relative_to(ROOT)) in USES_FACE:
        allowed |= {""}
    if here == "cli":
        allowed |= {"", "oracles"}                                      # the command is a user of the public face
    assert imported(path) - allowed == set(), f"{here} imports upward"


@pytest.mark.parametrize("path", sorted((ROOT / "mmu").glob("_[a-z]*.p*")), ids=lambda path: path.name)
def test_imports_run_downward_in_the_mmu(path):
    """Nothing in mmu/ imports a module of mmu/ above it."""
    if path.suffix not in (".pyx", ".pxd"):
        return
    names = {source.split(".")[2] for source, _, _ in IMPORT.findall(path.read_text()) if source.startswith("kvmmu.mmu.")}
    assert path.stem in MMU_LAYERS
    assert names - set(MMU_LAYERS[:MMU_LAYERS.index(path.stem) + 1]) == set(), f"mmu/{path.name} imports upward"


@each_source
def test_nothing_else_knows_the_file_formats(path):
    """Of the MMU only replay and the command import traces."""
    if room(path) not in (*USES_TRACES, *FACE, "traces"):
        assert "traces" not in imported(path)


def test_numbers_of_the_header_and_of_cython_are_the_same():
    """_bits.pxd declares every name that _bits.h defines, and no other."""
    header = re.findall(r"^#define\s+(\w+)", (ROOT / "_bits.h").read_text(), re.MULTILINE)
    declared = re.findall(r"^\s+(?:const\s+)?(?:u?int\d*_t|int)\s+(\w+)", (ROOT / "_bits.pxd").read_text(), re.MULTILINE)
    macros = {"KVMMU_BITS_H", "KVMMU_BIT"}
    assert set(header) - macros - set(declared) == set(), "in _bits.h only"
    assert set(declared) - set(header) == set(), "in _bits.pxd only"
    assert len(declared) == len(set(declared))


def test_flags_are_the_numbers_of_the_header():
    """IntFlag members have the values that the preprocessor would compute."""
    values = {}
    for name, text in re.findall(r"^#define\s+(\w+)\s+(.+?)(?:\s*/\*.*)?$", (ROOT / "_bits.h").read_text(), re.MULTILINE):
        expression = re.sub(r"KVMMU_BITS\(", "bits(", re.sub(r"KVMMU_BIT\(", "bit(", text))
        expression = re.sub(r"UINT64_C\((\d+)\)", r"\1", expression)
        try:
            values[name] = eval(expression, {
                "bit": lambda n: 1 << n, "bits": lambda a, b: (1 << (b + 1)) - (1 << a), **values}) & (2**64 - 1)
        except (SyntaxError, NameError, TypeError):
            continue
    for enum, prefix in ((kvmmu.Access, "ACCESS"), (kvmmu.Acc, "ACC"), (kvmmu.Pferr, "PFERR"), (kvmmu.Cr0, "CR0"),
                         (kvmmu.Cr4, "CR4"), (kvmmu.Efer, "EFER")):
        for member in enum:
            assert values[f"{prefix}_{member.name}_MASK"] == member, f"{enum.__name__}.{member.name}"
    for member in kvmmu.Status:
        assert values[f"STATUS_{member.name}"] == member


@each_cython_source
def test_directives_live_in_setup_py(path):
    """No directive comments, no @cython decorators, no `with cython`."""
    text = path.read_text()
    assert not re.search(r"^#\s*(cython|distutils)\s*:", text, re.MULTILINE)
    code = code_of(path)
    assert not re.search(r"@\s*cython\.|with\s+cython\.|c?import\s+cython\b", code)


@each_cython_source
def test_formats_are_told_apart_in_one_file(path):
    """`if guest_walker is` stands in _gpte.pxd only."""
    if path.name != "_gpte.pxd":
        assert not re.search(r"\bif\s+guest_walker\s+is\b", code_of(path))


@pytest.mark.parametrize("name", ["_walk.pyx", "_walk.pxd", "_gpte.pxd", "_plain.pyx", "_batch.pyx", *(
    f"mmu/{path.name}" for path in CYTHON if path.parent.name == "mmu")])
def test_walks_have_no_literal_masks(name):
    """Architectural numbers have names: no hexadecimal constants above 0xff, no shifts of a literal one by a literal."""
    code = code_of(ROOT / name)
    assert [] == [text for text in re.findall(r"\b0[xX][0-9a-fA-F]+", code) if int(text, 16) > 0xFF]
    assert [] == re.findall(r"\b1(?:[uU]?[lL]{0,2})?\s*<<\s*\d+", code)


@each_cython_source
def test_files_stay_small(path):
    """Under 500 lines; a file that holds two concerns is split."""
    assert len(path.read_text().splitlines()) < 500


@each_source
def test_removed_things_stay_removed(path):
    """No walk_mmu and no nested_mmu: one gva_walk, always, and one active mmu."""
    assert not re.search(r"\b(walk_mmu|nested_mmu)\b", path.read_text())


def test_a_vcpu_has_no_removed_attributes():
    """The same on the objects."""
    vcpu = kvmmu.Vcpu(kvmmu.GuestMemory(4096))
    for name in ("walk_mmu", "nested_mmu"):
        assert not hasattr(vcpu, name)
        assert not hasattr(vcpu.gva_walk, name)


def test_the_public_face_is_complete():
    """__all__ is what is there: sorted, without repetition, and nothing else is public."""
    assert sorted(kvmmu.__all__) == sorted(set(kvmmu.__all__))
    for name in kvmmu.__all__:
        assert hasattr(kvmmu, name)
    public = {name for name, value in vars(kvmmu).items()
              if not name.startswith("_") and type(value).__name__ != "module"}
    assert public - {"Any", "TYPE_CHECKING"} | {"open_trace"} == set(kvmmu.__all__)     # loaded when asked for
