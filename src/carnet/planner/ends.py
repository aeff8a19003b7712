"""Which tokens begin, end and fill a text: what the model, the tokenizer and the generation config beside it say, held together.

transformers' ``generate`` stops at the ``eos_token_id`` of generation_config.json, or where there is none at that of config.json.
"""

from collections.abc import Mapping

from carnet.model.fields import Config, Value
from carnet.model.model import value

Ids = tuple[int, ...]


def ends(config: Config, said: Mapping[str, Mapping[str, Ids]], rows: int) -> tuple[dict[str, Value], list[str]]:
    """Return the fields that a target's config gets, and what is contradicted.

    ``said``: bos, eos or pad -> who says it -> the ids. A field that the model has itself stays as it is.

    >>> both = {"eos": {"generation_config.json": (2, 3), "the tokenizer": (2,)}}
    >>> ends({}, both, 9)
    ({'eos': (2, 3)}, [])
    >>> ends({"eos": 4}, both, 9)
    ({}, ['eos: 4 of the model, 2 3 of generation_config.json, 2 of the tokenizer'])
    """
    fields: dict[str, Value] = {}
    contradicted = []
    for end, others in said.items():
        own = value(config, end)
        ids = {} if own is None else {"the model": own if isinstance(own, tuple) else (own,)}
        voices = {**ids, **others}
        common = set.intersection(*(set(each) for each in voices.values())) if voices else set()
        if others and (not common or max(max(each) for each in others.values()) >= rows):
            contradicted.append(f"{end}: " + ", ".join(f"{' '.join(map(str, each))} of {who}" for who, each in voices.items()))
        elif others and own is None:
            first = next(iter(others.values()))
            fields[end] = first if len(first) > 1 else first[0]
    return fields, contradicted
