"""The reader of recordings: what it returns, and that nothing but a whole and consistent recording passes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from paths import DATA, ROOT
from toy_recordings import META, NEEDS_ZSTD, U8, U16, U32, U64, npy, toy_answers, toy_tables, toy_trace, write_toy, zip_of

import kvmmu
from kvmmu.traces import Recording, RecordingError, bundled, open_npz

CLIPS = DATA / "linux"
ZIP_METHODS = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2,
               "lzma": zipfile.ZIP_LZMA}


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


@pytest.fixture(scope="session")
def tool():
    """tools/bundle_recording.py as a module."""
    spec = importlib.util.spec_from_file_location("bundle_recording", ROOT / "tools" / "bundle_recording.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewrite(file, **changes):
    """Replace arrays of an archive; None removes one."""
    with np.load(file) as archive:
        arrays = dict(archive) | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def assert_same_arrays(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, strict=True, err_msg=name)


# -- what a recording gives ------------------------------------------------------------------------------------------

def test_columns_of_a_hand_made_trace(toy):
    columns = Recording.open(toy).columns()
    assert_same_arrays(columns, {
        "gva": np.array([0x400000, 0x401008, 0xFFFFFFFFFFFFFFFF, 0x400010, 0x401018, 0xFFFFFFFFFFFFF020], U64),
        "gpa": np.array([0x5000, 0x6008, 0xFEE00FFF, 0x5010, 0x6018, 0xFEE00020], U64),
        "kind": np.array([0, 1, 2, 0, 1, 2], U8), "size": np.array([8, 4, 1, 8, 4, 1], U8),
        "priv": np.array([0, 1, 2, 2, 0, 1], U8), "io": np.array([0, 0, 1, 0, 0, 1], U8),
        "ctx": np.array([0, 0, 1, 0, 0, 1], U32)})


def test_access_bytes_of_a_hand_made_trace(toy):
    recording = Recording.open(toy)
    expected = np.array([0, 2 | 4, 16 | 8, 8, 2, 16 | 4], U8)
    np.testing.assert_array_equal(recording.access_bytes(), expected, strict=True)
    np.testing.assert_array_equal(recording.access_bytes(2, 5), expected[2:5], strict=True)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (1, 4), (4, None), (-2, None), (3, 100)])
def test_columns_of_a_slice(toy, start, stop):
    recording = Recording.open(toy)
    whole = recording.columns()
    assert_same_arrays(recording.columns(start, stop), {name: array[start:stop] for name, array in whole.items()})


def test_attributes_of_the_static_phase(toy):
    recording = Recording.open(toy)
    assert (recording.name, recording.phase, recording.phases) == ("toy", "static", ("static", "dyn"))
    assert (recording.mode, recording.nested, recording.maxphyaddr, recording.pkru) == ("4l", False, 40, 0x55555554)
    assert recording.pkrs == 0
    assert recording.registers == {"cr0": 0x80050033, "cr2": 0, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01, "cpl": 3,
                                   "ip": 0x400000}
    assert recording.meta == META
    assert recording.vmcb is None
    assert len(recording) == 6
    assert [array.size for array in recording.writes] == [0, 0, 0]
    assert repr(recording) == "<Recording toy static: 6 accesses, mode 4l>"


def test_attributes_of_the_dynamic_phase(toy):
    recording = Recording.open(toy, "dyn")
    trace, tables = toy_trace(), toy_tables()
    assert recording.pkru == 0
    assert_same_arrays({f"ev_{name}": array for name, array in recording.events._asdict().items()}
                       | {f"pf_{name}": array for name, array in recording.faults._asdict().items()}
                       | {f"npf_{name}": array for name, array in recording.npt_faults._asdict().items()},
                       {name: trace[name] for name in trace if name.startswith(("ev_", "pf_", "npf_"))})
    assert_same_arrays({f"w_{name}": array for name, array in recording.writes._asdict().items()}
                       | {"pfn": recording.table_pfn, "level": recording.table_level, "data": recording.table_data},
                       tables)
    assert recording.table_data.flags.c_contiguous


def test_meta_of_a_nested_guest(toy):
    vmcb = {"gpa": "0x9000", "nested_cr3": "0x8000", "asid": 7}
    meta = META | {"vmcb": vmcb, "cpu": "max,phys-bits=48,erms=off", "pkru_workload": None}
    (toy / "meta.json").write_text(json.dumps(meta))
    recording = Recording.open(toy)
    assert recording.nested
    assert recording.vmcb == {"gpa": 0x9000, "nested_cr3": 0x8000, "asid": 7}
    assert (recording.maxphyaddr, recording.pkru) == (48, 0)


def test_answers(toy):
    recording = Recording.open(toy)
    assert_same_arrays(recording.gva2gpa(), toy_answers() | {"mapped": np.array([1, 0], U8)})
    assert_same_arrays(recording.info_tlb(), toy_answers() | {"flags": np.array([0x1FF, 0], U16)})
    assert_same_arrays(recording.kvm_translate(), toy_answers() | {"valid": np.array([1, 0], U8)})


def test_empty_trace_is_a_recording(toy):
    empty = {name: array[:0] for name, array in toy_trace().items() if name != "ctx"}
    rewrite(toy / "static_trace.npz", **empty)
    recording = Recording.open(toy)
    assert len(recording) == 0
    assert recording.columns()["gva"].size == recording.access_bytes().size == 0


def test_recorded_addresses_are_not_judged(toy):
    """They are what a walk is compared with, so a flipped bit must come through."""
    rewrite(toy / "static_trace.npz", page_gpa=np.array([0x5001, (1 << 52) - 1, 0], U64))
    assert Recording.open(toy).columns()["gpa"][0] == 0x5001


# -- which phase, which file -----------------------------------------------------------------------------------------

def test_a_trace_file_names_its_phase(toy):
    assert Recording.open(toy / "dyn_trace.npz").phase == "dyn"
    assert Recording.open(str(toy / "static_trace.npz"), "static").phase == "static"
    with pytest.raises(ValueError, match="static_trace.npz: is the static phase"):
        Recording.open(toy / "static_trace.npz", "dyn")


def test_the_only_phase_is_the_default(toy):
    (toy / "static_trace.npz").unlink()
    assert Recording.open(toy).phase == "dyn"
    with pytest.raises(RecordingError, match="no phase 'static'; available is dyn"):
        Recording.open(toy, "static")


def test_unknown_phase(toy):
    with pytest.raises(ValueError, match=r"phase must be one of \('static', 'dyn'\), not 'end'"):
        Recording.open(toy, "end")


def test_paths_that_are_no_recording(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such recording"):
        Recording.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere.npz: no such file, nor one with .zst appended"):
        open_npz(tmp_path / "nowhere.npz")
    with pytest.raises(RecordingError, match="tables.npz: neither a directory nor static_trace.npz"):
        Recording.open(toy / "tables.npz")
    with pytest.raises(RecordingError, match="not a recording: it holds no static_trace.npz"):
        Recording.open(tmp_path)


@pytest.mark.parametrize("name", ["meta.json", "tables.npz", "gva2gpa.npz"])
def test_missing_file(toy, name):
    (toy / name).unlink()
    with pytest.raises(RecordingError, match=f"{name}: missing"):
        Recording.open(toy).gva2gpa()


# -- real recordings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode", "phase"), [
    ("l4", "4l", "static"), ("l5", "5l", "dyn"), ("pae", "pae", "static"),
    pytest.param("p32", "32", "static", marks=NEEDS_ZSTD)])
def test_clips_match_their_own_counts(tool, name, mode, phase):
    recording = Recording.open(CLIPS / name)
    counts = recording.meta["phases"][phase]
    assert (recording.name, recording.mode, recording.phase, recording.nested) == (name, mode, phase, False)
    assert len(recording) == counts["accesses"]
    assert recording.table_pfn.size == counts["table_pages"]
    assert recording.writes.pos.size == counts.get("table_writes", 0)
    recounted = tool.count_trace(open_npz(CLIPS / name / f"{phase}_trace.npz"))
    assert recounted == {key: counts[key] for key in recounted}
    assert (recording.registers["cr3"] >> 12) in recording.table_pfn
    assert recording.gva2gpa()["mapped"].any()
    assert recording.info_tlb()["gva"].size > 10_000


def test_bundled_recording_opens_with_numpy_alone(monkeypatch):
    without_zstd_readers(monkeypatch)
    recording = Recording.open(bundled())
    counts = recording.meta["phases"]["dyn"]
    assert (recording.name, recording.mode, recording.phase) == ("l4", "4l", "dyn")
    assert len(recording) == counts["accesses"] == 1_312_805
    assert recording.faults.pos.size == counts["page_faults"] > 1000
    assert recording.writes.pos.size == counts["table_writes"] > 10_000


def test_bundled_recording_is_small():
    assert sum(file.stat().st_size for file in bundled().iterdir()) < 500_000


@pytest.mark.parametrize("name", ["l4", "l5"])
def test_numpy_reads_the_same_arrays(name):
    for file in (CLIPS / name).glob("*.npz"):
        with np.load(file) as archive:
            assert_same_arrays(open_npz(file), dict(archive))


# -- the tool --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lzma", "deflate", pytest.param("zst", marks=NEEDS_ZSTD)])
def test_tool_round_trip(tool, tmp_path, method):
    if method == "zst":
        pytest.importorskip("zstandard", reason="the tool writes zstd with the zstandard package")
    source = Recording.open(CLIPS / "l5")
    accesses = 450_000
    clip = tool.bundle(CLIPS / "l5", tmp_path, accesses, answers=("info_tlb",), method=method)
    assert len(clip) == clip.meta["phases"]["dyn"]["accesses"] == accesses
    assert clip.meta["clipped_from"] == {"dyn": {"accesses": len(source)}}
    assert_same_arrays(clip.columns(), source.columns(0, accesses))
    for attribute in ("events", "faults", "npt_faults", "writes"):
        kept = getattr(source, attribute).pos < accesses
        assert_same_arrays(getattr(clip, attribute)._asdict(),
                           {name: array[kept] for name, array in getattr(source, attribute)._asdict().items()})
    np.testing.assert_array_equal(clip.table_data, source.table_data, strict=True)
    assert_same_arrays(clip.info_tlb(), source.info_tlb())


def test_tool_output_is_reproducible(tool, tmp_path, monkeypatch):
    for place, now in (("first", 1e9), ("second", 1.5e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        tool.bundle(CLIPS / "pae", tmp_path / place, 1000, phase="static")
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["meta.json", "static_trace.npz", "tables.npz"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_tool_of_a_whole_phase_changes_nothing(tool, toy, tmp_path):
    whole = tool.bundle(toy, tmp_path / "out", None)
    assert "clipped_from" not in whole.meta
    expected = {name: array for name, array in toy_trace().items() if not name.startswith("ev_")}
    copied = open_npz(tmp_path / "out" / "dyn_trace.npz")
    assert_same_arrays({name: copied[name] for name in expected}, expected)
    assert whole.meta["phases"]["dyn"] == {
        "accesses": 6, "loads": 2, "stores": 2, "fetches": 2, "user": 2, "smap_off": 2, "guest": 0, "page_rows": 3,
        "contexts": 2, "io": 2, "page_crossing": 0, "unique_gva_pages": 3, "page_faults": 1, "npt_faults": 1,
        "pf_errors": {"0x6": 1}, "npf_info1": {"0x100000000": 1}, "events": {"1": 1, "7": 1}, "table_pages": 2,
        "table_writes": 2}


def test_tool_from_the_command_line(toy, tmp_path):
    command = [sys.executable, ROOT / "tools" / "bundle_recording.py", toy, tmp_path / "out"]
    package = Path(kvmmu.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, "--accesses", "2"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "<Recording toy dyn: 2 accesses, mode 4l>\n"
    refused = subprocess.run([*command, "--accesses", "0"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "0 is not a count of at least one" in refused.stderr


# -- zstd ------------------------------------------------------------------------------------------------------------

def without_zstd_readers(monkeypatch):
    for module in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("PATH", "")


def only_stdlib(monkeypatch):
    """The module of Python 3.14; on an older Python a stand-in with the same face."""
    if sys.version_info < (3, 14):
        zstandard = pytest.importorskip("zstandard", reason="stands in for compression.zstd")
        module = types.ModuleType("compression.zstd")
        module.DecompressionParameter = types.SimpleNamespace(window_log_max=100)

        module.ZstdDecompressor = lambda options: zstandard.ZstdDecompressor(max_window_size=1 << options[100]).decompressobj()
        package = types.ModuleType("compression")
        package.zstd = module
        monkeypatch.setitem(sys.modules, "compression", package)
        monkeypatch.setitem(sys.modules, "compression.zstd", module)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setenv("PATH", "")


def only_package(monkeypatch):
    pytest.importorskip("zstandard", reason="the package under test")
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setenv("PATH", "")


def only_tool(monkeypatch):
    if shutil.which("zstd") is None:
        pytest.skip("no zstd command line tool")
    for module in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture(params=[only_stdlib, only_package, only_tool])
def one_zstd_reader(request, monkeypatch):
    request.param(monkeypatch)


@pytest.fixture(scope="session")
def zst(tmp_path_factory):
    """The toy trace as `.npz.zst`, in two frames with a 128 MiB window."""
    zstandard = pytest.importorskip("zstandard", reason="writes the test's zstd stream")
    content = zip_of((f"{name}.npy", npy(array)) for name, array in toy_trace().items())
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    file = tmp_path_factory.mktemp("zst") / "dyn_trace.npz.zst"
    file.write_bytes(compressor.compress(content) + compressor.flush())
    assert zstandard.get_frame_parameters(file.read_bytes()).window_size == 1 << 27
    return file


def test_zst_by_each_reader(zst, one_zstd_reader):
    assert_same_arrays(open_npz(zst), toy_trace())
    assert_same_arrays(open_npz(zst.with_suffix("")), toy_trace())


def test_zst_clip_by_each_reader(one_zstd_reader):
    assert len(Recording.open(CLIPS / "p32")) == 200_000


def test_zst_in_several_frames(zst, tmp_path, monkeypatch):
    only_package(monkeypatch)
    import zstandard

    content = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(zst.read_bytes()).read()
    halves = content[:1000], content[1000:]
    file = tmp_path / "frames.npz.zst"
    file.write_bytes(b"".join(zstandard.ZstdCompressor().compress(half) for half in halves))
    assert_same_arrays(open_npz(file), toy_trace())


def test_zst_without_a_reader(zst, monkeypatch):
    without_zstd_readers(monkeypatch)
    with pytest.raises(ImportError, match=r"dyn_trace.npz.zst: reading .zst needs .*kvmmu\[zstd\]"):
        open_npz(zst)


def test_truncated_zst(zst, tmp_path, one_zstd_reader):
    whole = zst.read_bytes()
    file = tmp_path / "cut.npz.zst"
    for length in np.linspace(0, len(whole) - 1, 25).astype(int):
        file.write_bytes(whole[:length])
        with pytest.raises(RecordingError, match="cut.npz.zst: "):
            open_npz(file)


def test_flipped_zst(zst, toy, monkeypatch):
    only_package(monkeypatch)
    (toy / "dyn_trace.npz").unlink()
    check_flips(toy / "dyn_trace.npz.zst", zst.read_bytes(), lambda: Recording.open(toy, "dyn").columns())


# -- damage to the container -----------------------------------------------------------------------------------------

def check_flips(file, whole, read):
    """Each inverted byte of `file` makes `read` refuse, or is of no consequence (a date, a comment)."""
    file.write_bytes(whole)
    expected = read()
    refused = 0
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 0xFF
        file.write_bytes(damaged)
        try:
            actual = read()
        except RecordingError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert_same_arrays(actual, expected)
    assert refused > len(whole) // 2


@pytest.mark.parametrize("method", ZIP_METHODS)
def test_truncated_archive(tmp_path, method):
    arrays = toy_tables()
    whole = zip_of(((f"{name}.npy", npy(array)) for name, array in arrays.items()), ZIP_METHODS[method])
    file = tmp_path / "cut.npz"
    for length in np.linspace(0, len(whole) - 1, 200).astype(int):
        file.write_bytes(whole[:length])
        with pytest.raises(RecordingError, match="cut.npz: "):
            open_npz(file)


@pytest.mark.parametrize("method", ZIP_METHODS)
def test_flipped_archive(toy, method):
    recording = Recording.open(toy)
    whole = zip_of(((f"{name}.npy", npy(array)) for name, array in recording.gva2gpa().items()), ZIP_METHODS[method])
    check_flips(toy / "gva2gpa.npz", whole, recording.gva2gpa)


def header(text, length=None):
    """Make the start of an npy file, version 1."""
    encoded = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + (length or len(encoded)).to_bytes(2, "little") + encoded


@pytest.mark.parametrize(("member", "message"), [
    (b"", "npy: .*magic string|magic string"),
    (b"\x93NUMPY\x09\x00", r"npy version \(9, 0\)"),
    (header("{'descr': '<u8', 'fortran_order': False, 'shape': (4,)}") + bytes(24), r"24 bytes .* shape \(4,\) .* 32"),
    (header("{'descr': '<u8', 'fortran_order': False, 'shape': (2,)}") + bytes(24), r"24 bytes .* shape \(2,\) .* 16"),
    (header("{'descr': '<u8', 'fortran_order': False, 'shape': (1 << 60,)}"), "not a whole numpy array"),
    (header(f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({1 << 60},)}}"), "0 bytes of data"),
    (header("{'descr': '<u8', 'fortran_order': False, 'shape': (-1, -1)}") + bytes(8), "not a whole numpy array"),
    (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + bytes(8), "dtype object means pickled objects"),
    (header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}") + bytes(8), "pickled objects"),
    (header("{'descr': '|V0', 'fortran_order': False, 'shape': (3,)}"), "not a whole numpy array"),
    (header("{'descr': '<u8', 'shape': (1,)}") + bytes(8), "not a whole numpy array"),
    (header("{'descr': '''"), "not a whole numpy array"),
    (header("(" * 5000), "not a whole numpy array"),
    (header("{}", 60000), "not a whole numpy array"),
])
def test_bad_npy_member(tmp_path, member, message):
    file = tmp_path / "bad.npz"
    file.write_bytes(zip_of([("pfn.npy", member)]))
    with pytest.raises(RecordingError, match=message) as caught:
        open_npz(file)
    assert f"{file}: pfn: " in str(caught.value)


def test_pickled_objects_are_refused_before_unpickling(toy):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(toy / "gva2gpa.npz", gva=np.array([Trap()], dtype=object))
    with pytest.raises(RecordingError, match="gva2gpa.npz: gva: .*dtype object means pickled objects"):
        Recording.open(toy).gva2gpa()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_array_present_twice(tmp_path):
    file = tmp_path / "twice.npz"
    file.write_bytes(zip_of([("pfn.npy", npy(np.zeros(1, U64))), ("pfn.npy", npy(np.ones(1, U64)))]))
    with pytest.raises(RecordingError, match="twice.npz: pfn: present twice"):
        open_npz(file)


def test_size_beyond_the_archive(tmp_path):
    """A directory entry that claims more bytes than there are."""
    file = tmp_path / "long.npz"
    whole = bytearray(zip_of([("pfn.npy", npy(np.zeros(4, U64)))]))
    entry = whole.rindex(b"PK\x01\x02")
    for field in (20, 24):      # compressed and uncompressed size
        whole[entry + field:entry + field + 4] = (0x7FFFFFFF).to_bytes(4, "little")
    file.write_bytes(whole)
    with pytest.raises(RecordingError, match="long.npz: "):
        open_npz(file)


def test_fortran_order_and_scalars(tmp_path):
    arrays = {"matrix": np.asfortranarray(np.arange(6, dtype=U64).reshape(2, 3)), "scalar": np.array(7, U8),
              "note": np.array("text")}
    np.savez(tmp_path / "odd.npz", **arrays)
    read = open_npz(tmp_path / "odd.npz")
    assert_same_arrays(read, arrays)
    assert read["matrix"].flags.c_contiguous
    assert read["matrix"].flags.writeable


# -- arrays that break the layout ------------------------------------------------------------------------------------

BAD_TRACE = [
    ("pidx", None, "missing; the file has ctx, ev_aux"),
    ("ctx", None, "missing"),
    ("pidx", np.zeros(6, U64), "dtype is <u8; allowed is uint16 or uint32"),
    ("off", np.zeros(6, ">u2"), "dtype is >u2; allowed is uint16"),
    ("kind", np.zeros(6, np.int8), "dtype is .i1; allowed is uint8"),
    ("page_gva", np.zeros(3, np.float64), "dtype is <f8; allowed is uint64"),
    ("kind", np.zeros((6, 1), U8), "has 2 dimensions; allowed is 1"),
    ("ctx", np.zeros(6, U64), "has 1 dimensions; allowed is 2"),
    ("off", np.zeros(5, U16), r"has shape \(5,\); allowed is 6 \(accesses\)"),
    ("page_io", np.zeros(4, U8), r"has shape \(4,\); allowed is 3 \(page rows\)"),
    ("ctx", np.zeros((2, 5), U64), r"has shape \(2, 5\); allowed is 6"),
    ("ev_val", np.zeros(2, U64), r"has shape \(2,\); allowed is 3 \(events\)"),
    ("pf_err", np.zeros(2, U32), r"allowed is 1 \(page faults\)"),
    ("npf_gpa", np.zeros(2, U64), r"allowed is 1 \(NPT faults\)"),
    ("pidx[4]", np.array([0, 1, 2, 0, 3, 2], U16), r"is 3 \(0x3\); allowed is below 3, the number of page rows"),
    ("pidx[5]", np.array([0, 1, 2, 0, 1, 1 << 31], U32), "is 2147483648 .* below 3"),
    ("off[1]", np.array([0, 4096, 0, 0, 0, 65535], U16), r"is 4096 \(0x1000\); allowed is below 4096"),
    ("kind[3]", np.array([0, 1, 2, 3, 0, 0], U8), r"is 3 .* 0 load, 1 store, 2 fetch"),
    ("priv[0]", np.array([255, 1, 2, 0, 0, 0], U8), r"is 255 .* 0 supervisor, 1 user"),
    ("size[2]", np.array([8, 4, 0, 8, 4, 1], U8), "is 0 .* at least one byte"),
    ("page_ctx[2]", np.array([0, 1, 2], U32), "is 2 .* below 2, the number of contexts"),
    ("page_gpa[1]", np.array([0, 1 << 52, 0], U64), "is 4503599627370496 .* physical addresses of 52 bits"),
    ("page_gpa[2]", np.array([0, 0, 2**64 - 4096], U64), "is 18446744073709547520 .* physical addresses of 52 bits"),
    ("npf_gpa[0]", np.array([2**64 - 1], U64), "is 18446744073709551615 .* physical addresses of 52 bits"),
    ("ctx", np.zeros((0, 6), U64), "has no row; allowed is at least one register context"),
    ("page_io[0]", np.array([2, 0, 0], U8), "is 2 .* 0 memory, 1 MMIO"),
    ("ctx[1]", np.array([[1] * 6, [9] * 6], U64), "is 9 .* 0 or 1 in the first column"),
    ("ev_code[1]", np.array([7, 5, 3], U8), r"is 5 .* one of \(1, 2, 3, 4, 7\)"),
    ("ev_pos[2]", np.array([0, 2, 1], U64), "is 1 .* not less than the position before it"),
    ("ev_pos[2]", np.array([0, 2, 7], U64), "is 7 .* below 7"),
    ("pf_pos[0]", np.array([6], U64), "is 6 .* below 6, the number of accesses"),
    ("pf_ctx[0]", np.array([2], U32), "is 2 .* below 2, the number of contexts"),
    ("npf_pos[0]", np.array([1 << 63], U64), r"is 9223372036854775808 \(0x8000000000000000\)"),
]
BAD_TABLES = [
    ("pfn", None, "missing; the file has data, level"),
    ("w_val", None, "missing"),
    ("data", np.zeros((2, 512), U64), "dtype is <u8; allowed is uint8"),
    ("data", np.zeros((2, 4095), U8), r"has shape \(2, 4095\); allowed is 4096"),
    ("data", np.zeros((3, 4096), U8), r"has shape \(3, 4096\); allowed is 2 \(table pages\)"),
    ("data", np.zeros(8192, U8), "has 1 dimensions; allowed is 2"),
    ("level", np.zeros(2, U64), "dtype is <u8; allowed is uint32"),
    ("pfn[1]", np.array([1, 1 << 40], U64), r"is 1099511627776 \(0x10000000000\); allowed is below 1099511627776"),
    ("pfn[1]", np.array([2, 2], U64), "is 2 .* no earlier row has"),
    ("w_pos[1]", np.array([4, 1], U64), "is 1 .* not less than the position before it"),
    ("w_pos[1]", np.array([1, 6], U64), "is 6 .* below 6, the number of accesses"),
    ("w_gpa[0]", np.array([0x1004, 0x2000], U64), "is 4100 .* a multiple of 8"),
    ("w_gpa[1]", np.array([0x1000, 0x3000], U64), "is 12288 .* inside a page of pfn"),
]
BAD_ANSWERS = [
    ("gva2gpa", "mapped[1]", np.array([0, 2], U8), "is 2 .* 0 no, 1 yes"),
    ("kvm_translate", "gpa[0]", np.array([1 << 52, 0], U64), "is 4503599627370496 .* physical addresses of 52 bits"),
    ("gva2gpa", "gpa", np.zeros(3, U64), r"has shape \(3,\); allowed is 2 \(answers\)"),
    ("info_tlb", "flags", np.zeros(2, U8), "dtype is .u1; allowed is uint16"),
    ("kvm_translate", "valid[0]", np.array([3, 0], U8), "is 3 .* 0 no, 1 yes"),
]


def check_refused(place, message, read):
    with pytest.raises(RecordingError, match=message) as caught:
        read()
    assert f".npz: {place}: " in str(caught.value)


@pytest.mark.parametrize(("place", "array", "message"), BAD_TRACE)
def test_bad_trace(toy, place, array, message):
    rewrite(toy / "dyn_trace.npz", **{place.split("[")[0]: array})
    check_refused(place, message, lambda: Recording.open(toy, "dyn"))


@pytest.mark.parametrize(("place", "array", "message"), BAD_TABLES)
def test_bad_tables(toy, place, array, message):
    rewrite(toy / "dyn_tables.npz", **{place.split("[")[0]: array})
    check_refused(place, message, lambda: Recording.open(toy, "dyn"))


def test_no_tables(toy):
    rewrite(toy / "tables.npz", pfn=np.zeros(0, U64), level=np.zeros(0, U32), data=np.zeros((0, 4096), U8))
    with pytest.raises(RecordingError, match="tables.npz: pfn: has no row; allowed is at least one table page"):
        Recording.open(toy)


@pytest.mark.parametrize(("name", "place", "array", "message"), BAD_ANSWERS)
def test_bad_answers(toy, name, place, array, message):
    rewrite(toy / f"{name}.npz", **{place.split("[")[0]: array})
    check_refused(place, message, getattr(Recording.open(toy), name))


@pytest.mark.parametrize(("content", "message"), [
    ("{", "not JSON"), ("\udc00", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "is a list; allowed is an object"),
    ({"mode": "6l"}, "mode: is '6l'; allowed is one of"), ({"mode": None}, "mode: is None"),
    ({"cr3": "4g"}, "cr3: is '4g'; allowed is a 64-bit number"), ({"cr3": None}, "cr3: is None"),
    ({"cr0": "-0x1"}, "cr0: is '-0x1'"), ({"cr4": 1 << 64}, "cr4: is 18446744073709551616"),
    ({"cpl": True}, "cpl: is True"), ({"vmcb": 3}, "vmcb: is 3; allowed is an object"),
    ({"vmcb": {"cr3": []}}, r"cr3: is \[\]"), ({"pkru_workload": {}}, "pkru_workload: is {}"),
    ({"pkrs_workload": 1 << 32}, "pkrs_workload: is 0x100000000; allowed is a number of 32 bits"),
    ({"pkru_workload": 1 << 40}, "pkru_workload: is 0x10000000000; allowed is a number of 32 bits"),
    ({"cpu": "max,phys-bits=99"}, "cpu: phys-bits is 99; allowed is 32 to 52"), ({"cpu": "phys-bits=31"}, "phys-bits is 31"),
])
def test_bad_meta(toy, content, message):
    text = content if isinstance(content, str) else json.dumps(META | content)
    (toy / "meta.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(RecordingError, match=message) as caught:
        Recording.open(toy)
    assert str(toy / "meta.json") in str(caught.value)
