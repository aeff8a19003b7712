"""What the program that loads a Megatron checkpoint must be told besides: what its saved arguments do not bring into the model.

``--use-checkpoint-args`` carries some arguments over; the others stand on the command line, where a release has a flag for them, or the
model that is loaded is another one without a word: many have no weights.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as having

from carnet.dialects.megatron.programs import BRIDGE, LM, Program, model_of, stopped, used
from carnet.dialects.megatron.providers import lacked, provider_for
from carnet.dialects.megatron.releases import BY_NAME, FREQUENCY, RELEASES, Argument, Arguments
from carnet.errors import NotSupported
from carnet.model.keys import equal

CARRY = "--use-checkpoint-args"
NEEDS = "needs"  # what a person accepts by --accept, where the arguments lack fields
DTYPES = {"torch.bfloat16": "--bf16", "torch.float16": "--fp16", "torch.float32": ""}  # validate_args has the type from these
NOWHERE = "nowhere"  # where an argument that reaches no model is handed on
# what Megatron-Bridge and NeMo call otherwise: GPTModelProvider, GPTConfig
PROVIDED = {"use_rope_scaling": "rope_scaling", "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor"}


@dataclass(frozen=True, slots=True)
class Needs:
    """What a person must say to the program that loads a target."""

    program: str  # one of PROGRAMS
    releases: tuple[str, ...]  # of Megatron-LM, that can be told; empty for other programs
    # for the command line: "--norm-epsilon 1e-06"; of other programs the fields of their config: "rope_scaling True"
    flags: tuple[str, ...]
    fields: Mapping[str, object] = having(default_factory=dict)  # of the model, that no argument says
    provider: str = ""  # of Megatron-Bridge, that has all of them: its class or its layer spec

    @property
    def data(self) -> dict[str, object]:
        """Return it as plain values, for plans and documents."""
        own: dict[str, object] = {"fields": dict(self.fields)} if self.fields else {}
        own |= {"provider": self.provider} if self.provider else {}
        return {"program": self.program, "releases": [*self.releases], "say": [*self.flags], **own} if self.program else {}

    @property
    def word(self) -> str:
        """Name the program as a requirement."""
        return f"{self.program}=={self.releases[-1]}" if self.releases else self.program


NOTHING = Needs("", (), ())


def needs(said: Arguments, reader: Program | None, *, local: bool) -> Needs:
    """Return what the reader of a checkpoint with these arguments must be told; None is any release of Megatron-LM since 0.16.

    ``local``: the modules are those of Megatron's local spec. Raises NotSupported where no flag says what the model needs.
    """
    own, found = lacked(said), provider_for(said)
    provider = "" if found is None else found.path
    said = {name: value for name, value in said.items() if name in BY_NAME}
    if reader is not None and reader.name != LM:
        told = {
            name: value for name, value in said.items() if _how(BY_NAME[name], RELEASES[-1]) == "no" and name != "vocab_size"
        }
        fields = (
            f"{PROVIDED.get(name, name)} {value}" for name, value in told.items() if not equal(value, BY_NAME[name].default)
        )
        return Needs(reader.name, (), tuple(fields), own, provider)
    releases = RELEASES[1:] if reader is None or not reader.release else (reader.release,)
    against: dict[str, Mapping[str, str]] = {release: _against(said, release) for release in releases}
    able = tuple(release for release, reasons in against.items() if not reasons)
    if not able:
        raise NotSupported(
            f"{LM} computes another model than this one, whatever it is told",
            {"argument": "release: why", **_by_argument(against)},
            remedy=f"--read-by {BRIDGE}, if that program will load it: it hands these on",
        )
    flags = [flag for release in able for name in said for flag in _flags(BY_NAME[name], said[name], release) or ()]
    whose = ["--transformer-impl local"] if local else []
    return Needs(LM, able, tuple(dict.fromkeys([CARRY, *whose, *flags])), own, provider)


def _by_argument(against: Mapping[str, Mapping[str, str]]) -> dict[str, object]:
    """Return why each argument stands against the releases, those that say the same together."""
    found: dict[str, dict[str, list[str]]] = {}
    for release, reasons in against.items():
        for name, reason in reasons.items():
            found.setdefault(name, {}).setdefault(reason, []).append(release)
    return {
        name: "; ".join(f"{', '.join(releases)}: {reason}" for reason, releases in reasons.items())
        for name, reasons in found.items()
    }


def _against(said: Arguments, release: str) -> dict[str, str]:
    """Return why a release cannot compute with these arguments: argument -> reason."""
    has = used(dict(said), release)
    if has is None:
        name = stopped(said, release)
        return {name: f"{said[name]!r} builds no such model"}
    model = model_of(said)
    lost = {name for name, value in said.items() if not equal(has.get(name), value)}
    reasons = {
        name: f"{said[name]!r} is not handed to the model" + (f", which has {has[name]!r}" if has.get(name) else "")
        for name in sorted(lost)
        if model_of({**said, name: has.get(name)}) != model
    }
    for name, value in said.items():
        if name not in reasons and _flags(BY_NAME[name], value, release) is None:
            reasons[name] = f"no flag says {value!r}"
    return reasons


def _how(row: Argument, release: str) -> str:
    """Return what --use-checkpoint-args does about an argument."""
    return [how for since, how in row.carried if since <= release][-1]


def _flags(row: Argument, value: object, release: str) -> tuple[str, ...] | None:
    """Return what says an argument's value besides the checkpoint: nothing, a flag, or None where no flag does."""
    if _how(row, release) != "no" or row.where.startswith(NOWHERE) or equal(value, row.default):
        return ()
    if row.name == "params_dtype":
        return tuple(filter(None, [DTYPES.get(str(value))]))
    if not row.flag or not row.since <= release <= row.until:
        return None
    if row.kind is bool:
        return (row.flag,)
    text = _spelled(row, value)
    return None if text is None else (f"{row.flag} {shlex.quote(text)}",)


def _spelled(row: Argument, value: object) -> str | None:
    """Return a value as its flag reads it; None where the flag cannot."""
    if isinstance(value, list | tuple):
        parts = ",".join(map(str, value))
        return parts if row.kind is tuple else f"[{parts}]" if row.kind is FREQUENCY else None
    if row.kind is int and isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return str(value)
