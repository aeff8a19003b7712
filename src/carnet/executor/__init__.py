"""Make the target that a plan describes: bounded memory, resumable, complete or not there.

::

    plan -> jobs -> threads (direct | windows | check) -> OUT.partial -> verify (by the caller) -> OUT
"""
