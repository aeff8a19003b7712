"""A target signed as OpenSSF's `model_signing` signs models (OMS), with a statement of where it came from beside.

::

    every file of OUT ──sha256──┬─> carnet.intoto.jsonl   in-toto: these files, from those sources, by this request (SLSA provenance)
                                └─> model.sig             OMS: the digests of all files, that of the statement among them

Both are signed with one key, and each file is read once. ``pip install 'carnet[sign]'`` brings the library.
"""

from carnet.signing.checking import Checked, Trust, check
from carnet.signing.making import Key, Signed, sign

__all__ = ["Checked", "Key", "Signed", "Trust", "check", "sign"]
