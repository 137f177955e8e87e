# SPDX-License-Identifier: Apache-2.0
"""A guest of QEMU of one boot sector, which makes page tables, and QEMU's monitor."""

import json
import shutil
import socket
import subprocess
import time

QEMU = shutil.which("qemu-system-x86_64")
# What it does: page tables at 0x10000 (identity of the first 2 MiB by 4K pages, every fourth read-only, some NX; a 2M page; a 1G
# page; an alias at the top; the root mapped by itself at entry 256), long mode, stores at 0x200123 and 0x200200 for ever.
BOOT_SECTOR = bytes.fromhex("""
fa31c08ed88ec08ed0bc0070b800108ec031ff31c0b90060fcf3aa2666c7060000071001002666c706f80f032001002666c7060008030001002666c7
060010073001002666c7060810870000402666c7060c10000000802666c706f82f034001002666c7060030075001002666c7060830870120002666c7
06f84f830100002666c706fc4f000000806631dbbf00506689d86683c80766f7c30030000075046683e0fd266689056631d266f7c300700000751466
85db740f6681fb00700000740666ba0000008026668955046681c30010000083c7086681fb0000200075b066b8000001000f22d80f20e0660db00000
000f22e066b9800000c00f32660d010900000f300f0116407d0f20c0660d010001800f22c0ea1a7d080048c7c02301200048890048ff042500022000
ebec66900000000000000000ffff0000009aaf000f00307d
""").ljust(510, b"\0") + b"\x55\xaa"
SIZE = 64 << 20


class Machine:
    """A machine, by its QMP socket."""

    def __init__(self, folder):
        (folder / "boot").write_bytes(BOOT_SECTOR)
        self.process = subprocess.Popen(
            [QEMU, "-accel", "tcg", "-machine", "pc,memory-backend=ram", "-object",
             f"memory-backend-file,id=ram,size={SIZE},mem-path={folder}/ram,share=on", "-m", f"{SIZE >> 20}", "-smp", "2", "-cpu",
             "max", "-nodefaults", "-display", "none", "-drive", f"file={folder}/boot,format=raw,if=ide", "-qmp",
             f"unix:{folder}/qmp,server=on,wait=off"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(f"{folder}/qmp")
                break
            except OSError:
                assert time.monotonic() < deadline, "no QMP socket"
                time.sleep(0.05)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.run("qmp_capabilities")

    def run(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer or "error" in answer:
                return answer

    def monitor(self, line):
        return self.run("human-monitor-command", **{"command-line": line})["return"]

    def close(self):
        self.run("quit")
        self.process.wait(30)
        self.file.close()
        self.socket.close()
