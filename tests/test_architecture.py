# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: who may import whom, and rules of style that a reader relies on."""

import ast
import re
from pathlib import Path

import pytest

import kvmmu

ROOT = Path(__file__).parents[1] / "kvmmu"                               # the sources, not what is installed
# Each package says under its docstring in which order its modules and packages stand, lowest first ("# Order:"), and each
# package at the top says which others it imports ("# Below:"; "kvmmu" is the public face).
LAYERS = re.compile(r"^# (Order|Below): (.*(?:\n#     .*)*)$", re.MULTILINE)
FACE = ("__init__", "__main__")                                         # may import everything
FACE_USERS = ("cli",)                                                   # the command: a user of the public face
HEADER_ROOMS = ("include",)                                             # of C headers alone, for programs: below everything
KNOW_FORMATS = ("replay", "comparison", "cli")
# Imports that go up, and are to go: each is still there.
UPWARD = {("arch._gpte", "memory._memory"), ("traces.stream", "traces.parquet")}
SOURCES = sorted(path for suffix in ("py", "pyi", "pyx", "pxd") for path in ROOT.rglob(f"*.{suffix}"))
CYTHON = [path for path in SOURCES if path.suffix in (".pyx", ".pxd")]
HEADERS = sorted([*ROOT.rglob("*.h"), *ROOT.rglob("kernels/*.c")])
PACKAGES = sorted(path.parent for path in ROOT.rglob("__init__.py"))
IMPORT = re.compile(r"^[ \t]*(?:from[ ]+(kvmmu[\w.]*)\s+c?import\s+(\([^)]*\)|[^#\n]*)|c?import\s+(kvmmu[\w.]*))", re.MULTILINE)
INCLUDE = re.compile(r'^\s*(?:cdef extern from|#\s*include)\s+"([^"]*)"', re.MULTILINE)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
each_cython_source = pytest.mark.parametrize("path", CYTHON, ids=lambda path: str(path.relative_to(ROOT)))
each_package = pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.relative_to(ROOT.parent)))


def name_of(path):
    """The dotted name of a module below kvmmu; of a package "room.__init__"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path) for path in SOURCES}


def layers_of(package):
    """The two lines of a package, as lists of names."""
    text = (package / "__init__.py").read_text()
    return {head: re.sub(r"\s*\n#\s*", " ", names).split(", ") for head, names in LAYERS.findall(text)}


def place(name, *, package=ROOT):
    """Where a module stands: a tuple that is larger for a module further up."""
    head, _, rest = name.partition(".")
    if head in FACE:
        return (len(MODULES),)
    if head in HEADER_ROOMS and package == ROOT:
        return (-1,)
    order = layers_of(package)["Order"]
    assert head in order, f"{package.name} does not say where {head} stands"
    return (order.index(head), *(place(rest, package=package / head) if rest else ()))


def imported(path):
    """Modules of the package that a file imports: dotted names below kvmmu; a package itself is "room.__init__"."""
    found = set()
    for source, names, plain in IMPORT.findall(path.read_text()):
        module = (source or plain)[len("kvmmu."):]
        if module in MODULES:
            found.add(module)
            continue
        prefix = f"{module}." if module else ""
        for word in names.strip("()").replace("\n", " ").split(",") if source else [""]:
            name = prefix + word.split(" as ")[0].strip()
            is_package = f"{name}.__init__" in MODULES and name not in kvmmu.__all__
            found.add(name if name in MODULES else f"{name}.__init__" if is_package else f"{prefix}__init__")
    return found


def room_of(name):
    """The first part of a dotted name."""
    return name.split(".")[0]


def one(name):
    """The only file of this name, in whatever room."""
    path, = ROOT.rglob(name)
    return path


def code_of(path):
    """The text without comments, docstrings and other string literals."""
    text = re.sub(r'("""|\'\'\').*?\1', "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', '""', text)
    return re.sub(r"#.*", "", text)


def test_the_pattern_of_imports_sees_all_of_them():
    """The regular expression finds what Python's own parser finds."""
    for path in SOURCES:
        if path.suffix not in (".py", ".pyi"):
            continue
        expected = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            expected |= {name[len("kvmmu."):] for name in names if name and name.startswith("kvmmu.")}
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        found = imported(path) | {name.removesuffix(".__init__") for name in imported(path)}
        found |= {name.rpartition(".")[0] for name in found}
        assert expected <= found, str(path)


@each_package
def test_each_package_says_what_it_is_and_where_its_modules_stand(path):
    """A docstring, and a place for every module and package in it, for nothing else."""
    text = (path / "__init__.py").read_text()
    assert ast.get_docstring(ast.parse(text))
    order = layers_of(path)["Order"]
    children = {child.stem for child in path.iterdir() if child in SOURCES or child in PACKAGES} - set(FACE)
    assert sorted(order) == sorted(children)


@each_source
def test_imports_run_downward(path):
    """Nothing imports a module that stands above it."""
    here = name_of(path)
    for name in imported(path) - {"__init__", here}:
        package = name.removesuffix("__init__")
        if here.startswith(package) and package or (here, name) in UPWARD:
            continue                                                    # of the package that it is in; named above
        assert place(name.removesuffix(".__init__")) < place(here), f"{here} imports {name}"


@each_source
def test_no_module_changes_another_one(path):
    """No module-level assignment to an attribute of what was imported: that is an import upward in disguise."""
    if path.suffix not in (".py", ".pyi"):
        assert not re.search(r"^[A-Za-z]\w*(\.\w+)+\s*=[^=]", code_of(path), re.MULTILINE)
        return
    targets = [target for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign) for target in node.targets]
    assert not [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]


@each_package
def test_each_room_names_the_rooms_that_it_imports(path):
    """All of them, and no other. Who names a module of a room imports this one alone."""
    if path.parent != ROOT:
        assert "Below" not in layers_of(path)
        return
    here, used = path.name, set()
    for source in SOURCES:
        if path in source.parents:
            used |= {name for name in imported(source) if room_of(name) != here and (name_of(source), name) not in UPWARD}
    below = layers_of(path)["Below"]
    found = {name if name in below else "kvmmu" if name == "__init__" else room_of(name) for name in used}
    assert sorted(found) == sorted(set(below) - {"nothing"})


def test_the_public_face_is_for_its_users():
    """No module below imports `kvmmu` itself."""
    users = {name_of(path) for path in SOURCES if "__init__" in imported(path)}
    rooms = {path.name for path in PACKAGES if path.parent == ROOT and "kvmmu" in layers_of(path)["Below"]}
    assert {room_of(user) for user in users} - set(FACE) <= rooms | set(FACE_USERS)


def test_imports_that_go_up_are_those_that_are_named():
    """An entry of UPWARD that is mended goes."""
    found = {(name_of(path), name) for path in SOURCES for name in imported(path)}
    assert UPWARD <= found


@pytest.mark.parametrize("path", [*HEADERS, *CYTHON], ids=lambda path: str(path.relative_to(ROOT)))
def test_headers_are_included_downward(path):
    """By their path from the root; those of a room come from it, or from rooms below."""
    for target in INCLUDE.findall(path.read_text()):
        if not target.startswith("kvmmu/"):                             # of Python or of the system
            assert Path(target).name not in {header.name for header in HEADERS}, f"not a path from the root: {target}"
            continue
        header = ROOT.parent / target
        assert header.is_file()
        for mine, other in zip(path.relative_to(ROOT).parts[:-1], header.relative_to(ROOT).parts[:-1], strict=False):
            if mine != other:
                assert place(other) < place(mine), f"{path.name} includes {target}"
                break


def test_nothing_else_knows_the_file_formats():
    """Of the MMU only replay and the command import traces."""
    users = {room_of(name_of(path)) for path in SOURCES if "traces" in {room_of(name) for name in imported(path)}}
    assert users - {"traces", *FACE} == set(KNOW_FORMATS)


def test_numbers_of_the_header_and_of_cython_are_the_same():
    """_bits.pxd declares every name that _bits.h defines, and no other."""
    header = re.findall(r"^#define\s+(\w+)", one("_bits.h").read_text(), re.MULTILINE)
    declared = re.findall(r"^\s+(?:const\s+)?(?:u?int\d*_t|int)\s+(\w+)", one("_bits.pxd").read_text(), re.MULTILINE)
    macros = {"KVMMU_BITS_H", "KVMMU_BIT"}
    assert set(header) - macros - set(declared) == set(), "in _bits.h only"
    assert set(declared) - set(header) == set(), "in _bits.pxd only"
    assert len(declared) == len(set(declared))


def test_flags_are_the_numbers_of_the_header():
    """IntFlag members have the values that the preprocessor would compute."""
    values = {}
    for name, text in re.findall(r"^#define\s+(\w+)\s+(.+?)(?:\s*/\*.*)?$", one("_bits.h").read_text(), re.MULTILINE):
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


@pytest.mark.parametrize("path", [*(one(name) for name in ("_walk.pyx", "_walk.pxd", "_gpte.pxd", "_fast.pyx", "_job.pyx")),
                                  *(path for path in CYTHON if ROOT / "mmu" in path.parents)],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_walks_have_no_literal_masks(path):
    """Architectural numbers have names: no hexadecimal constants above 0xff, no shifts of a literal one by a literal."""
    code = code_of(path)
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
    assert public - {"Any", "TYPE_CHECKING", "import_module"} | set(kvmmu._LOADED_LATER) == set(kvmmu.__all__)


def test_tests_import_no_tests():
    """What two of them need is in tests/support."""
    tests = Path(__file__).parent
    assert [] == [str(path.relative_to(tests)) for path in tests.rglob("*.py")
                  if re.search(r"^\s*(?:from|import) test_\w+", path.read_text(), re.MULTILINE)]


def test_what_the_map_says_is_there():
    """Each file of "Where is it decided?" exists, and has the function that is named before it."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    section = text.partition("## Where is it decided?")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 15
    for row in rows:
        functions = []
        for name in re.findall(r"`([^`]+)`", row):
            if name.endswith("()"):
                functions.append(name.removesuffix("()").rpartition(".")[2])
                continue
            source = (ROOT / name).read_text()
            for function in functions:
                assert re.search(rf"\b{function}\(", source), f"{name} has no {function}()"
            functions = []
        assert functions == [], row
