"""What a person asked of a target, as far as it steers a comparison.

It comes from the person (options, or a plan that they hold) and from the source, never from the target: what is examined does not say
what it is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from shlex import quote

from carnet.errors import shown
from carnet.formats.amax import read_amax
from carnet.plans.request import OPTIONS, Request, flag_of

ANY = Request()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what the file says that it names."""

    request: Request = ANY
    amax: Mapping[str, float] = field(default_factory=dict)  # what calibration found, by the names of Hugging Face modules
    foreign: bool = (
        False  # the target is another program's, and what it computes of weights as near to the true result as that one's
    )


# fields of a request that steer a comparison -> the option that says it
COMPARED = {name: flag_of(name) for name, option in OPTIONS.items() if option.compared} | {"tokens": "--tokenizer DIR, tokens"}
FILES = [name for name, option in OPTIONS.items() if option.value == "path"]  # fields of a request that name a file


def asked_of(request: Mapping[str, object]) -> Asked:
    """Return what steers a comparison of a request that is kept as plain values: in a plan, or made of options."""
    asked = Request.from_data(request)
    return Asked(asked, {} if asked.amax is None else read_amax(asked.amax))


def words(said: Mapping[str, object]) -> list[str]:
    """Return the options that say what a request says, as they are written on the command line.

    >>> words({"dtype": "bf16", "drop": ["*extra"], "vocab_size": None, "amax": {"name": "amax.safetensors"}})
    ['--dtype bf16', "--drop '*extra'", '--amax amax.safetensors']
    """
    return [word for name in COMPARED for word in _words(name, said.get(name))]


def _words(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [f"{COMPARED[name]} {_quoted(each)}" for each in value]
    return [f"{COMPARED[name]} {_quoted(value['name'] if isinstance(value, Mapping) and 'name' in value else value)}"]


def _quoted(value: object) -> str:
    return quote(shown(str(value)))
