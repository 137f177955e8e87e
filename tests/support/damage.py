# SPDX-License-Identifier: Apache-2.0
"""Files truncated and corrupted at random places and read: what test_files_hostile.py runs in processes of their own.

`python damage.py FOLDER FILE TRUNCATIONS CORRUPTIONS SEED` prints one JSON object: how many copies were refused, how many read,
and the peak of memory in MiB.
"""

import json
import random
import re
import resource
import shutil
import sys
from pathlib import Path

import kvmmu
from kvmmu.traces import Recording, RecordingError, TraceError

ANSWERS = ("gva2gpa", "info_tlb", "kvm_translate")


def peak():
    """The most memory that this process had, in MiB. ru_maxrss will not do: a child begins with that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def read(file):
    """Read all that depends on a file; what is read must be replayed or refused, too."""
    if file.suffix == ".parquet":
        kvmmu.replay(file)
        return
    name = file.name.split(".")[0]
    phase = "dyn" if name.startswith("dyn") else "static" if name in ("static_trace", "tables") else None
    recording = Recording.open(file.parent, phase)
    if name in ANSWERS:
        getattr(recording, name)()
    if name == "meta":
        kvmmu.replay(recording)


def damaged(whole, rng):
    """A copy with a flipped bit, another byte, a run of zeros or of noise, a part that is missing or there twice."""
    content = bytearray(whole)
    at = rng.randrange(len(content))
    length = rng.choice((1, 1, 4, 8, 64, 4096))
    kind = rng.randrange(6)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[at] = rng.randrange(256)
    elif kind == 2:
        content[at:at + length] = bytes(len(content[at:at + length]))
    elif kind == 3:
        content[at:at + length] = rng.randbytes(len(content[at:at + length]))
    elif kind == 4:
        del content[at:at + length]
    else:
        content[at:at] = content[at:at + length]
    return bytes(content)


def sweep(file, truncations, corruptions, seed):
    """Read so many damaged copies of a file; returns (refused, read). Anything but a refusal that names the file is an error."""
    whole = file.read_bytes()
    rng = random.Random(seed)
    cuts = [whole[:rng.randrange(len(whole))] for _ in range(truncations)]
    counts = {"refused": 0, "read": 0}
    for number, content in enumerate([*cuts, *(damaged(whole, rng) for _ in range(corruptions))]):
        file.write_bytes(content)
        try:
            read(file)
        except (RecordingError, TraceError) as error:
            assert str(file.parent) in str(error), f"copy {number} of seed {seed}: no file in {error}"
            counts["refused"] += 1
        except BaseException:
            print(f"copy {number} of seed {seed}", file=sys.stderr)
            raise
        else:
            counts["read"] += 1
    file.write_bytes(whole)
    return counts


def main(folder, name, truncations, corruptions, seed):
    counts = sweep(Path(folder) / name, int(truncations), int(corruptions), int(seed))
    shutil.rmtree(folder)
    print(json.dumps(counts | {"peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
