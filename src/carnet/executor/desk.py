"""A *desk* is what one worker has: its open files and its buffers, made once and used for every job."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carnet.executor.files import Folder
from carnet.steps import Plan

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Desk:
    """One worker's belongings."""

    plan: Plan
    sources: Folder
    targets: Folder
    window: Bytes  # bytes of the target being assembled
    block: Bytes  # bytes of the source just read
    scratch: Bytes  # temporaries of casts
    tell: Callable[[int], None]  # takes the bytes done since the last call; raises where the crossing was stopped
