"""The peak of a child's private memory, told by the kernel: what is mapped from files is not private.

``SAMPLED`` is the beginning of a child's program, which then finds the peak in ``peak`` once it has called ``stop()``.
"""

SAMPLED = """
import sys, threading
from pathlib import Path

peak, over = 0, threading.Event()
def private():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
def sample():
    global peak
    while not over.wait(0.002):
        peak = max(peak, private())
thread = threading.Thread(target=sample)
def stop():
    over.set()
    thread.join()
"""
