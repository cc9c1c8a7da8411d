"""Runs a command and sees to it that nothing of it is left: ``python guard.py COMMAND ...``, at the head of a process group of its own.

When stdin ends - because who started it closed it, or died, however it died - or when the command itself ends, whatever the group still holds is
asked to end, and killed ten seconds later. Exits with the command's code, or 128 and the signal that ended it. Stands alone, as `launch.py` does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

PATIENCE = 10.0


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, restore_signals=True, preexec_fn=_heed)

    def watch() -> None:
        sys.stdin.buffer.read()
        _end(command)

    threading.Thread(target=watch, daemon=True).start()
    code = command.wait()
    os.killpg(0, signal.SIGTERM)
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
