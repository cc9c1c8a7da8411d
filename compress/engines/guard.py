"""Runs a command and sees to it that nothing of it is left: ``python guard.py COMMAND ...``, at the head of a process group of its own.

When the command ends, whatever else the group holds is asked to end, and this exits with the command's code, or 128 and the signal that ended it.
When stdin ends first - because who started it closed it, or died, however it died - all are asked to end; what does not is killed, the command after
ten seconds and what it left behind a second later. Stands alone, as `launch.py` does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE = 10.0
GRACE = 1.0


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, restore_signals=True, preexec_fn=_heed)

    abandoned = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        abandoned.set()
        _end(command)

    threading.Thread(target=watch, daemon=True).start()
    code = command.wait()
    os.killpg(0, signal.SIGTERM)
    if abandoned.is_set():
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)  # nobody is there to be told a code
    os._exit(code if code >= 0 else 128 - code)


def _heed() -> None:
    """The command does not inherit that signals are ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _end(command: subprocess.Popen[bytes]) -> None:
    os.killpg(0, signal.SIGTERM)
    try:
        command.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
