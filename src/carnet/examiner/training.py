"""How far a training is: the step of an optimizer, its groups of parameters, the learning rate's schedule, what was read so far."""

from collections.abc import Iterator, Mapping

from carnet.examiner.compare import Finding
from carnet.formats.training import EXPERT, Group, alike
from carnet.inventory.survey import Inventory
from carnet.model.model import planes

WHERE = "training state"
NONE = "nothing"


def check_training(source: Inventory, target: Inventory) -> Iterator[Finding]:
    """Yield what is otherwise in a target with which a training shall go on."""
    ours, theirs = source.checkpoint.training, target.checkpoint.training
    if ours is None or not planes(source.config):
        return
    if theirs is None:
        yield Finding("missing", WHERE, "", "the target does not say how far the training is")
        return
    yield from _apart("", ours.words, theirs.words)
    for group in theirs.groups:
        like = [each for each in ours.groups if alike(each) == alike(group)]
        first = next((each for each in like if each.get(EXPERT) == group.get(EXPERT)), like[0] if like else None)
        if first is None:
            yield Finding("not in the source", WHERE, "", f"a group of parameters, {_words(group)}")
        else:
            yield from _apart("a group of parameters: ", {**first, EXPERT: None}, {**group, EXPERT: None})
    there = {(alike(group), bool(group.get(EXPERT))) for group in theirs.groups}
    apart, told = (any(group.get(EXPERT) for group in each.groups) for each in (theirs, ours))
    for group in ours.groups:
        # Megatron looks for a group of experts by that name where ranks share these, and for no other
        wanted = ({bool(group.get(EXPERT))} if told else {False, True}) if apart else {False}
        if not there.issuperset((alike(group), expert) for expert in wanted):
            yield Finding("missing", WHERE, "", f"a group of parameters, {_words(group)}")


def _apart(of: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterator[Finding]:
    for key in sorted({*ours, *theirs}):
        expected, found = (said.get(key, NONE) for said in (ours, theirs))
        if expected != found:
            yield Finding("training state differs", WHERE, "", f"{of}{key}: expected {expected}, found {found}")


def _words(group: Group) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(group.items()) if isinstance(value, int | float))
