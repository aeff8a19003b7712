"""Steps from one version to a later one: deltas that follow each other, and a tensor on its way through them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from xxhash import xxh3_128

from carnet.deltas import artifact, chain, packing
from carnet.deltas.artifact import CHECKSUMS, COMPRESSED, WHOLE, Artifact
from carnet.deltas.packing import Bytes, Unpacker
from carnet.deltas.sides import Side, Tensor
from carnet.errors import MADE_AGAIN, BadCheckpoint, BadRequest, shown
from carnet.formats.files import contents
from carnet.plans.options import PathLike, local
from carnet.storage.protocol import File, Opened
from carnet.storage.schemes import folder_at


@dataclass(frozen=True, slots=True)
class Steps:
    """Deltas that follow each other, and their open shards."""

    deltas: tuple[Artifact, ...]
    files: tuple[Opened[File], ...]

    @property
    def proven(self) -> bool:
        """Say whether each says the digests of all tensors."""
        return all(each.link is not None for each in self.deltas)

    @property
    def checked(self) -> bool:
        """Say whether each says at least checksums of the tensors that changed."""
        return all(each.link is not None or each.scope == WHOLE for each in self.deltas)

    @property
    def told(self) -> list[dict[str, str]]:
        """Return the steps as documents have them."""
        return [
            {"base_version": each.base_version, "version": each.version}
            | ({} if each.link is None else {"digest": chain.digest(each.link.after)})
            for each in self.deltas
        ]

    def memory(self, window: int) -> int:
        """Return the bytes that a worker takes for them."""
        return window + len(self.deltas) * packing.DECODER


def steps_of(deltas: PathLike | Sequence[PathLike]) -> Steps:
    """Return one delta, or several in their order; raise BadRequest where one is missing or in another's place."""
    packing.zstd()
    paths = [deltas] if isinstance(deltas, str) or not isinstance(deltas, Sequence) else [*deltas]
    if not paths:
        raise BadRequest("there is no delta to apply", remedy="name the folder of one, or of several in their order")
    found = [artifact.read(folder_at(local("delta", path))) for path in paths]
    for one, other in pairwise(found):
        chain.check_follows((one.where, one.version, one.link), (other.where, other.base_version, other.link))
    return Steps(tuple(found), tuple(Opened(each.where.open) for each in found))


def close(steps: Steps) -> None:
    """Close the shards."""
    for files in steps.files:
        files.close()


def check_base(base: Side, steps: Steps) -> None:
    """Raise BadRequest where a version cannot be what deltas apply to, as far as headers tell."""
    first = steps.deltas[0]
    facts: dict[str, object] = {"base": base, "delta": first.where}
    version = None if base.folder is None else chain.version_of(base.folder)
    if version not in (None, first.base_version):
        facts |= {"expected": f"version {first.base_version}", "found": f"version {version}"}
        raise BadRequest("the base is another version than the delta applies to", facts, remedy="apply what leads there first")
    ours = {name: (tensor.dtype, tensor.shape) for name, tensor in base.tensors.items()}
    for each in steps.deltas:
        if each.link is None:
            odd = sorted(each.frames.keys() - ours.keys())
        else:
            theirs = {name: (held.dtype, held.shape) for name, held in each.link.before.items()}
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if odd:
            facts |= {"tensor": shown(odd[0]), "in all": len(odd)}
            remedy = "name the folder that the delta was made from; where it has another form: carnet cross CKPT OUT --to hf"
            raise BadRequest("the base does not have the tensors that the delta is of", facts, remedy=remedy)


@dataclass(slots=True)
class Step:
    """One frame of a tensor, as far as it is decoded."""

    delta: Artifact
    frame: Unpacker
    checksum: artifact.Checksum
    digest: xxh3_128 = field(default_factory=xxh3_128)  # of the tensor after it


class Stepping:
    """A tensor on its way through all steps."""

    def __init__(self, steps: Steps, tensor: Tensor) -> None:
        """Open the frames that change it."""
        self._name, self._base, self._deltas, self._steps = tensor.name, xxh3_128(), steps.deltas, dict[int, Step]()
        for number, (each, files) in enumerate(zip(steps.deltas, steps.files, strict=True)):
            if (frame := each.frames.get(tensor.name)) is None:
                continue
            file, checksum = files(frame.file), CHECKSUMS[each.checksum]()
            if each.scope == COMPRESSED:
                for data in contents(file, frame.offset, frame.offset + frame.nbytes):
                    checksum.update(memoryview(data))
            unpacker = Unpacker(file, frame.offset, frame.nbytes, tensor.nbytes, shown(tensor.name))
            self._steps[number] = Step(each, unpacker, checksum)

    def next(self, piece: Bytes, spare: Bytes) -> None:
        """Turn the next bytes of the base into those of the last version."""
        self._base.update(piece.data)
        for step in self._steps.values():
            difference = spare[: piece.size]
            step.frame.into(difference)
            np.bitwise_xor(piece, difference, out=piece)
            step.digest.update(piece.data)
            if step.delta.scope == WHOLE:
                step.checksum.update(piece.data)

    def end(self) -> str:
        """Return the digest of the last version; raise BadRequest or BadCheckpoint where a version is not as the deltas say."""
        now = self._base.hexdigest()
        for number, delta in enumerate(self._deltas):
            held = None if delta.link is None else (delta.link.before[self._name], delta.link.after[self._name])
            facts: dict[str, object] = {"delta": delta.where, "tensor": shown(self._name)}
            if held is not None and held[0].digest != now:
                facts |= {"expected": f"xxh3-128 {held[0].digest}", "found": now}
                what = f"{shown(self._name)} is not what version {shown(delta.base_version)} has: the base is another one"
                raise BadRequest(what, facts, remedy="name the base that the delta was made from")
            if (step := self._steps.get(number)) is None:
                continue
            said, found, now = delta.frames[self._name].checksum, step.checksum.hexdigest(), step.digest.hexdigest()
            if said != found or (held is not None and held[1].digest != now):
                facts |= {"expected": f"{delta.checksum} {said}", "found": found}
                if held is None:  # nothing says what the base was
                    facts["or"] = f"the base is not version {shown(delta.base_version)}"
                raise BadCheckpoint(f"the delta of {shown(self._name)} is damaged", facts, remedy=MADE_AGAIN)
        return now
