"""A pseudo-terminal, on which a program shows what a person would see."""

import os
import pty
import re
import subprocess
import sys
import threading

COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(*command, columns=80, code=0):
    """Return what a program shows on a terminal, line by line, and ask that it ends with this code."""
    master, slave = pty.openpty()
    shown = bytearray()

    def read():
        while True:
            try:
                shown.extend(os.read(master, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    ended = subprocess.run([sys.executable, *map(str, command)], stdout=slave, stderr=slave, env=environment, check=False)
    os.close(slave)
    reader.join()
    os.close(master)
    assert ended.returncode == code, shown.decode()
    return COLOUR.sub("", shown.decode()).replace("\r\n", "\n").replace("\r", "\n").split("\n")
