# SPDX-License-Identifier: Apache-2.0
"""No object and no argument ends the process: every method and property of every compiled class is called on objects that
`__init__()` never saw, and with arguments that make no sense, in processes of their own.

What such a call raises does not matter here, nor what it returns. A call that ends its process, or that does not come back,
fails by name.
"""

import enum
import faulthandler
import importlib.util
import inspect
import os
import pkgutil
import resource
import signal
import struct
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kvmmu
import kvmmu.traces
from kvmmu.memory._mapping import PrivateFile
from kvmmu.replay._replay import new_row_loop
from kvmmu.traces._recorded_rows import RecordedRows
from kvmmu.walk._vcpu_arch import new_arch
from kvmmu.walk.pagewalk import new_walk

SECONDS = 10                            # for one call, on a machine that does much else
ADDRESS_SPACE = 3 << 30                 # more than what a process has already: a size that makes no sense is refused at once
SKIPPED = {"__class__", "__new__", "__getattribute__", "__setattr__", "__delattr__", "__init_subclass__", "__subclasshook__",
           "__dir__", "__doc__", "__sizeof__", "__format__", "__module__", "__dict__", "__weakref__", "__getstate__",
           "__class_getitem__"}
REGS = kvmmu.Regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)


def compiled_modules():
    """The extension modules of the package."""
    names = [info.name for info in pkgutil.walk_packages(kvmmu.__path__, "kvmmu.")]     # some .py only run within other programs
    return [importlib.import_module(name) for name in names
            if Path(importlib.util.find_spec(name).origin or "").suffix in (".so", ".pyd")]


MODULES = compiled_modules()
CLASSES = [value for module in MODULES for value in vars(module).values() if isinstance(value, type) and
           value.__module__ == module.__name__ and not issubclass(value, (enum.Enum, BaseException))]
FUNCTIONS = [value for module in MODULES for value in vars(module).values()
             if callable(value) and not isinstance(value, type) and getattr(value, "__module__", None) == module.__name__]


class World:
    """A guest with tables, and one real object of each class."""

    def __init__(self):
        self.mem = mem = kvmmu.GuestMemory(0x20000)
        for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4000, 0x5067),
                           (0x8000, 0x9007), (0x9000, 0xA007), (0xA000, 0xB7)):
            mem.write_u64(gpa, entry)
        self.host = kvmmu.Host()
        self.vm = kvmmu.Vm(mem, host=self.host)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_regs(**{name: getattr(REGS, name) for name in ("cr0", "cr3", "cr4", "efer")})
        self.vcpu.access(0)
        self.nested = kvmmu.Vcpu(mem)
        self.nested.enter_nested(kvmmu.Ept(0x8000 | 0x5E, pml=kvmmu.Pml(0xC000, 511)), cr0=1)
        self.snapshot = self.vm.snapshot()
        with open(__file__, "rb") as file:
            self.file = PrivateFile(file.fileno())
        self.walk = self.vcpu.gva_walk
        self.arch = new_arch()
        self.contexts = self.walk.prepare([REGS, REGS])
        self.walker = kvmmu.Walker(self.walk)
        one = np.zeros(1, np.uint64)
        none = one[:0]
        self.recording = SimpleNamespace(
            pidx=np.zeros(1, np.uint16), off=np.zeros(1, np.uint16), kind=np.zeros(1, np.uint8), priv=np.zeros(1, np.uint8),
            size=np.ones(1, np.uint8), pages_gva=one, pages_gpa=one + np.uint64(0x5000), pages_ctx=np.zeros(1, np.uint32),
            pages_io=np.zeros(1, np.uint8), ctx=np.zeros((1, 6), np.uint64),
            events=SimpleNamespace(pos=none, code=np.zeros(0, np.uint8), val=none, aux=none),
            faults=SimpleNamespace(pos=none, cr2=none, err=np.zeros(0, np.uint32), ctx=np.zeros(0, np.uint32)),
            npt_faults=SimpleNamespace(pos=none, gpa=none, info1=none), writes=SimpleNamespace(pos=none, gpa=none, val=none))
        self.chunk = kvmmu.traces.Chunk(
            op=np.zeros(1, np.uint8), addr=one, access=np.zeros(1, np.uint8), gpa=one + np.uint64(0x5000), size=None, vcpu=None,
            value=None, has_events=False, all_known=True, vcpus=1)
        self.loop = new_row_loop(self.walk, 1)
        self.loop.use(0, self.walk.prepare([REGS]))
        self.loop.load(self.chunk)


# One real object of each class; classes that nobody gets an object of have None.
REAL = {
    "GuestMemory": lambda w: w.mem, "PageWalk": lambda w: w.walk, "VcpuArch": lambda w: w.arch,
    "RegisterSets": lambda w: w.contexts,
    "SecondStage": lambda w: w.nested.gva_walk.second, "PageFormat": lambda w: w.walk.fmt, "Walker": lambda w: w.walker,
    "CpuRole": lambda w: w.walk.cpu_role, "RowLoop": lambda w: w.loop,
    "ReplayRegisters": lambda w: w.loop.registers, "RecordedRows": lambda w: RecordedRows(w.recording),
    "Tlb": lambda w: w.vcpu.tlb, "Machine": lambda w: w.vcpu._machine(), "TdpMmu": lambda w: w.vcpu.tdp_mmu,
    "ShadowMmu": lambda w: w.vcpu.shadow_mmu, "Kvm": lambda w: w.vm.kvm,
    "PrivateFile": lambda w: w.file, "PrivateMapping": lambda w: w.file.map(), "SavedMemory": lambda w: w.snapshot._memories[0],
    "SavedKvm": lambda w: w.snapshot._kvm, "SavedMachine": lambda w: w.snapshot._vcpus[0].machine,
    "SpteFormat": lambda w: importlib.import_module("kvmmu.mmu.core._spte").SpteFormat(w.host),
}

# Arguments that make sense, by their names; 0 for all others.
GOOD = {
    "gva": lambda w: np.zeros(3, np.uint64), "mem": lambda w: w.mem, "smm_mem": lambda w: w.mem, "vcpu": lambda w: 0,
    "regs": lambda w: REGS, "contexts": lambda w: w.contexts, "walk": lambda w: w.walk, "stage": lambda w: kvmmu.Ept(0x801E),
    "cpu": lambda w: kvmmu.CpuModel(), "host": lambda w: w.host, "fault": lambda w: kvmmu.PageFault("#PF"),
    "second": lambda w: None, "fields": lambda w: ("gpa", "pte"), "threads": lambda w: 1, "size": lambda w: 8,
    "chunk": lambda w: w.chunk, "recording": lambda w: w.recording, "source": lambda w: RecordedRows(w.recording),
    "admit": lambda w: lambda regs, second: regs, "pages": lambda w: np.zeros((1, 512), np.uint64), "gpas": lambda w: [0x1000],
    "data": lambda w: bytes(8), "vcpus": lambda w: 1, "size_or_buffer": lambda w: 0x1000, "pte": lambda w: 0x67,
    "level": lambda w: 4, "out": lambda w: None, "ctx": lambda w: None, "maxphyaddr": lambda w: 48, "state": lambda w: w.vm.kvm,
    "kvm": lambda w: w.vm.kvm, "arch": lambda w: w.arch, "buffer": lambda w: w.vcpu.tlb, "tlb": lambda w: w.vcpu.tlb,
    "machine": lambda w: w.vcpu._machine(), "name": lambda w: "portable", "gva_walk": lambda w: w.walk,
    "ngpa_walk": lambda w: w.vcpu.ngpa_walk, "arrays": lambda w: kvmmu.Accesses.empty(3).arrays(),
    "saved": lambda w: w.snapshot._kvm, "numbers": lambda w: np.zeros(1, np.uint64),
    "deliver": lambda w: lambda fault, from_hardware: None, "op": lambda w: np.zeros(1, np.uint8), "stop": lambda w: 1,
}

# Arguments that make none, most of the time.
WRONG = {
    "None": lambda w: None, "0": lambda w: 0, "1": lambda w: 1, "-1": lambda w: -1, "2**63": lambda w: 1 << 63,
    "2**64": lambda w: 1 << 64, "1.5": lambda w: 1.5, "'x'": lambda w: "x", "bytes": lambda w: bytes(8), "[]": lambda w: [],
    "[None]": lambda w: [None], "object()": lambda w: object(), "uint64[1]": lambda w: np.zeros(1, np.uint64),
    "uint8[0]": lambda w: np.zeros(0, np.uint8), "GuestMemory": lambda w: w.mem,
    "bare GuestMemory": lambda w: kvmmu.GuestMemory.__new__(kvmmu.GuestMemory), "PageWalk": lambda w: w.nested.ngpa_walk,
    "SecondStage": lambda w: w.nested.gva_walk.second, "RegisterSets": lambda w: w.contexts, "Vcpu": lambda w: w.vcpu,
    "a class": lambda w: kvmmu.GuestMemory,
}


# ---- calls -------------------------------------------------------------------------------------------------------------------

def parameters_of(function):
    """Names of the positional parameters and of the keyword-only ones; of a function that does not tell them: one, two, three."""
    try:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    except (TypeError, ValueError):
        return ["a", "b", "c"], []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional, [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]


def argument_sets(function, mark=()):
    """(description, maker of (args, kwargs) from a World): none, all that make sense, and each of the others in each place."""
    positional, named = parameters_of(function)
    names = positional + named

    def arguments(world, place=None, wrong=None, count=None):
        values = {name: WRONG[wrong](world) if name == place else GOOD.get(name, lambda w: 0)(world) for name in names}
        chosen = [*mark, *(values[name] for name in positional[:count])]
        return chosen, {name: values[name] for name in named if name == place}

    yield "", lambda world: ([], {})
    for count in range(1, len(positional) + 1):
        yield ", ".join(positional[:count]), lambda world, count=count: arguments(world, count=count)
        for wrong in ("None", "0"):
            yield f"{count} x {wrong}", lambda world, count=count, wrong=wrong: ([WRONG[wrong](world)] * count, {})
    for place in names:
        for wrong in WRONG:
            yield f"{place}={wrong}", lambda world, place=place, wrong=wrong: arguments(world, place, wrong)


def calls_of(cls, make):
    """(description, what to do with a World) for the attributes of an object."""
    for name in dir(cls):
        if name in SKIPPED:
            continue
        attribute = inspect.getattr_static(cls, name)
        yield f".{name}", lambda world, name=name: getattr(make(world), name)
        if not callable(getattr(cls, name, None)):
            if name.startswith("__"):
                continue
            for wrong in WRONG:
                yield f".{name} = {wrong}", lambda world, name=name, wrong=wrong: setattr(make(world), name, WRONG[wrong](world))
            continue
        function = getattr(cls, name)
        if isinstance(attribute, (staticmethod, classmethod)) or name.startswith("__"):
            function = getattr(cls, name)
        for text, arguments in argument_sets(function):
            def call(world, name=name, arguments=arguments):
                args, kwargs = arguments(world)
                return getattr(make(world), name)(*args, **kwargs)
            yield f".{name}({text})", call


def limit_memory():
    sizes = Path("/proc/self/statm")
    if sizes.exists() and "asan" not in os.environ.get("LD_PRELOAD", ""):
        now = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, now + ADDRESS_SPACE))


def run_in_child(calls, first, pipe):
    """Make the calls from `first` on; tell the number of each before it is made. Never returns."""
    errors = os.dup(2)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        limit_memory()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.disable()
        world = None
        for number in range(first, len(calls)):
            os.write(pipe, struct.pack("=I", number))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            if world is None or number % 50 == 0:
                world = World()
            try:
                result = calls[number][1](world)
                repr(result)
                del result
            except BaseException:
                pass
        world = None
        os._exit(0)
    except BaseException:
        os.write(errors, traceback.format_exc().encode())               # of this file: no call raises to here
        os._exit(1)


def crashes(what, calls):
    """Descriptions of the calls that end their process, with the signal."""
    found, first = [], 0
    calls = list(calls)
    while first < len(calls):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            run_in_child(calls, first, writer)
        os.close(writer)
        last = b""
        with os.fdopen(reader, "rb") as told:
            for block in iter(lambda: told.read(4), b""):
                last = block
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) == 0:
            break
        number = struct.unpack("=I", last)[0]
        how = f"exit status {os.waitstatus_to_exitcode(status)}"
        if os.WIFSIGNALED(status):
            how = signal.Signals(os.WTERMSIG(status)).name
        found.append(f"{what}{calls[number][0]}: {how}")
        first = number + 1
    return found


def name_of(value):
    return f"{value.__module__.removeprefix('kvmmu.')}.{value.__qualname__}"


each_class = pytest.mark.parametrize("cls", CLASSES, ids=name_of)


@pytest.fixture(autouse=True)
def forks():
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork()")


# ---- the tests ---------------------------------------------------------------------------------------------------------------

def test_the_package_is_found():
    """The walk over the package sees the classes that matter; each has a real object, or none can be had."""
    names = {cls.__name__ for cls in CLASSES}
    assert {"GuestMemory", "PageWalk", "RegisterSets", "Walker", "RowLoop", "Machine", "Kvm", "Tlb", "Job", "SlotTable"} <= names
    assert set(REAL) <= names
    for module in MODULES:
        assert module.__name__.startswith("kvmmu.")


@pytest.mark.parametrize("name", [
    "SlotTable", "Job", "Workspace", "WalkCache", "VcpuArch", "SecondStage", "WalkCopy", "RegisterSetWalks", "RegisterSets",
    "PageWalk",
    "BlockWalker", "ReplayRegisters", "RowLoop"])
@pytest.mark.parametrize("arguments", [(), (None,), (object(),), (1, 2, 3), (None,) * 6],
                         ids=["nothing", "None", "an object", "three numbers", "six times None"])
def test_what_only_the_package_makes(name, arguments):
    """TypeError says who makes such an object; a class derived from it makes none either."""
    cls = next(cls for cls in CLASSES if cls.__name__ == name)
    derived = type("Derived", (cls,), {"__init__": lambda self, *args: None})
    for make in (cls, derived):
        with pytest.raises(TypeError, match=r"made by|incorrect type"):
            make(*arguments)
        with pytest.raises(TypeError, match=r"made by|incorrect type"):
            make.__new__(make, *arguments)


def test_a_crash_is_named():
    """The test itself: a process that ends by a signal, and one that hangs, are told by the call."""
    calls = [("(1)", lambda world: 1), ("(2)", lambda world: os.kill(os.getpid(), signal.SIGKILL)), ("(3)", lambda world: 1 / 0),
             ("(4)", lambda world: (signal.setitimer(signal.ITIMER_REAL, 0.1), time.sleep(60)))]
    assert crashes("call", calls) == ["call(2): SIGKILL", "call(4): SIGALRM"]


@each_class
def test_constructors(cls):
    """Any arguments."""
    calls = [(text, lambda world, arguments=arguments: cls(*arguments(world)[0], **arguments(world)[1]))
             for text, arguments in argument_sets(cls)]
    calls += [(f"__new__: {text}", lambda world, arguments=arguments: cls.__new__(cls, *arguments(world)[0]))
              for text, arguments in argument_sets(cls)]
    if cls.__name__ in REAL:
        real = REAL[cls.__name__]
        calls += [(f"__init__ again: {text}", lambda world, arguments=arguments: cls.__init__(real(world), *arguments(world)[0]))
                  for text, arguments in argument_sets(cls)]
    assert crashes(f"{cls.__name__}: ", calls) == []


@each_class
def test_bare_objects(cls):
    """`__new__()` alone, and a derived class whose `__init__()` does nothing."""
    try:
        derived = type("Derived", (cls,), {"__init__": lambda self, *args: None})
    except TypeError:                                                   # final
        derived = cls
    assert crashes(cls.__name__, calls_of(cls, lambda world: cls.__new__(cls))) == []
    assert crashes(f"class Derived({cls.__name__})", calls_of(cls, lambda world: derived())) == []


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.__name__ in REAL], ids=name_of)
def test_wrong_arguments(cls):
    """None and wrong types for every argument of every method, and for every attribute, of a real object."""
    assert crashes(cls.__name__, calls_of(cls, REAL[cls.__name__])) == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_functions(function):
    """The same of the functions of compiled modules."""
    calls = [(f"({text})", lambda world, arguments=arguments: function(*arguments(world)[0], **arguments(world)[1]))
             for text, arguments in argument_sets(function)]
    assert crashes(function.__name__, calls) == []


@pytest.mark.parametrize("name", ["_set_cpu", "_init", "_set_second_stage", "_enter", "_leave", "_set_memory", "_set_delivery"])
def test_walks_after_odd_wiring(name):
    """What a vCPU calls to wire its walks leaves walks that answer or raise, whoever calls it with what."""
    calls = [(f"({text})", lambda world, arguments=arguments: wire_and_walk(world, name, arguments))
             for text, arguments in argument_sets(getattr(kvmmu.PageWalk, name))]
    assert crashes(name, calls) == []


def wire_and_walk(world, name, arguments):
    """Call a method of each kind of walk, then walk in every way; whatever raises, the next follows."""
    gva = np.arange(200, dtype=np.uint64)
    for walk in (world.walk, world.nested.gva_walk, world.nested.ngpa_walk, new_walk(world.mem, world.arch, lambda r, s: r)):
        args, kwargs = arguments(world)
        ways = [(getattr(walk, name), args, kwargs), (walk.gva_to_gpa, (0x123,), {}), (walk.walk_record, (0,), {}),
                (walk.translate, (gva,), {}), (kvmmu.Walker, (walk,), {}), (walk._init, (), {})]
        for way, args, kwargs in (*ways, *ways[1:]):
            try:
                way(*args, **kwargs)
            except Exception:
                continue
