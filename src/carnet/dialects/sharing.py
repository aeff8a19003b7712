"""A dialect without ranks, shared among ranks: Hugging Face's names, each rank holding a part of the tensors behind them.

What is cut follows from the canonical tensor, not from the name: an axis is cut wherever Megatron cuts it. The rows of linear layers
whose input is cut keep their biases whole, as everywhere.
"""

from dataclasses import replace
from functools import cache

from carnet.dialects.kinds import RANKS
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import Dialect, Row

# Megatron cuts it, engines keep it whole: vllm/model_executor/models/deepseek_mtp.py
WHOLE = {"mtp.project_embed", "mtp.project_hidden"}


@cache
def cuts() -> dict[str, str]:
    """Return what tensor parallelism cuts in each canonical tensor, "" for nothing."""
    rows = sorted(MEGATRON.rows, key=lambda row: bool(row.cut))  # some of a name are of programs that cut nothing
    return {tensor: row.cut for row in rows for tensor, _ in row.pattern.parts if tensor not in WHOLE}


def shared(dialect: Dialect) -> Dialect:
    """Return a dialect whose every rank holds a part.

    >>> from carnet.architectures.llama import LLAMA
    >>> [(row.name.split(".")[-2], row.cut) for row in shared(LLAMA.hf).rows if "self_attn" in row.name][:4]
    [('q_proj', 'kv'), ('k_proj', 'kv'), ('v_proj', 'kv'), ('o_proj', 'kv')]
    """
    return replace(
        dialect, kind=replace(dialect.kind, files=RANKS), rows=tuple(replace(row, cut=_cut(row)) for row in dialect.rows)
    )


def _cut(row: Row) -> str:
    """Return what tensor parallelism cuts in a stored tensor: the same in all its parts, or nothing."""
    found = {cuts().get(tensor, "") for tensor, _ in row.pattern.parts}
    return found.pop() if len(found) == 1 else ""
