# SPDX-License-Identifier: Apache-2.0
"""Calls in a process of their own: what they raise, or the signal that ends them."""

import os
import signal
import sys


def outcome(call, seconds=20):
    """(signal number or 0, text) of a call in a forked child: its type and message if it raises, else the type of its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            try:
                text = f"ok {type(call()).__name__}"
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode()[:60000])
            sys.stdout.flush()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    text = b""
    while part := os.read(reader, 1 << 16):
        text += part
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), text.decode(errors="replace")
