"""How far a training is, beside its tensors: the optimizer's groups of parameters with their step, the learning rate's schedule.

Megatron keeps that in the common state; a distributed optimizer, a plain one, and several that are chained each nest it otherwise.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from carnet.errors import BadCheckpoint, NotSupported
from carnet.formats.torch_opcodes import Value

FORM = "fully_reshardable"  # what is written: DistributedOptimizer.sharded_state_dict
EXPERT = "is_expert_parallel"
MOST = 10**12  # iterations: the folder is named after them
OPTIMIZER, SCHEDULER, OPERATIONS = "optimizer", "opt_param_scheduler", "num_floating_point_operations_so_far"
# what a run that goes on takes from the arguments: load_checkpoint in megatron/training/checkpointing.py
SAMPLES = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
SHARDING = "distrib_optim_sharding_type"  # in the facts about the store, by which Megatron chooses how to load
COMMON = (OPTIMIZER, SCHEDULER, OPERATIONS, "iteration")

Group = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Training:
    """How far a training is."""

    groups: tuple[Group, ...]  # of parameters, their step included
    scheduler: Group
    iteration: int
    operations: float
    samples: Group

    @property
    def words(self) -> dict[str, object]:
        """Return all of it but the groups, name -> value."""
        return {**self.scheduler, "iteration": self.iteration, OPERATIONS: self.operations, **self.samples}


def training_of(common: Mapping[str, object], args: Mapping[str, object], where: object) -> Training:
    """Return what the common state, as plain values, and the arguments say of a training."""
    parts = [*_parts(common.get(OPTIMIZER))]
    if any("grad_scaler" in part for part in parts):
        what = "the loss scale of a training in fp16 does not go along"
        raise NotSupported(what, {"where": where}, remedy="go on from the weights alone: leave out --with optimizer")
    groups = list[Group]()
    for group in (group for part in parts for group in _groups(part)):
        groups += [group] if group not in groups else []
    odd = [each for group in groups for each in (*alike(group), group.get("step")) if isinstance(each, Mapping | list)]
    if odd:
        found = {"where": where, "found": f"{odd[0]!r:.80}", "expected": "numbers and words"}
        raise BadCheckpoint("the optimizer's state does not say which group of parameters is which", found)
    steps = {group["step"] for group in groups if group.get("step") is not None}
    if len(steps) != 1:
        found = {"where": where, "groups of parameters": len(groups), "steps": ", ".join(map(str, steps)) or "-"}
        raise BadCheckpoint("the optimizer's state does not say one step", found)
    scheduler, iteration, operations = (common.get(key) for key in (SCHEDULER, "iteration", OPERATIONS))
    if not isinstance(scheduler, Mapping) or type(iteration) is not int or not 0 <= iteration < MOST:
        found = {"where": where, "looked for": f"{SCHEDULER}, iteration", "found": f"iteration {iteration!s:.40}"}
        raise BadCheckpoint("the common state does not say how far the training is", found)
    count = operations if isinstance(operations, int | float) else 0
    samples = {key: args[key] for key in SAMPLES if isinstance(args.get(key), int)}
    step = steps.pop()  # of an empty group some optimizers do not keep it
    return Training(tuple({**group, "step": step} for group in groups), scheduler, iteration, count, samples)


def is_apart(name: str) -> bool:
    """Say whether a stored object is the state of an optimizer whose buckets a group of ranks shares: one for each group.

    >>> is_apart("chained_0.optimizer.distributed.dp_group_idx_1.optimizer/shard_0_1")
    True
    """
    return ".dp_group_idx_" in name and name.rpartition(".")[2].startswith(("optimizer/", "grad_scaler/"))


def _parts(said: object) -> Iterable[Mapping[str, object]]:
    """Yield the state of each optimizer: of one, or of several in their order, a table by number or a list."""
    if isinstance(said, Mapping) and said and all(str(key).isdigit() for key in said):
        said = [said[key] for key in sorted(said, key=int)]
    for part in said if isinstance(said, list) else [said]:
        if isinstance(part, list):
            yield from _parts(part)
        elif isinstance(part, Mapping):
            yield part


def _groups(part: Mapping[str, object]) -> Iterable[Group]:
    inner = part.get(OPTIMIZER, part)
    groups, state = (inner.get(key) if isinstance(inner, Mapping) else None for key in ("param_groups", "state"))
    step = state.get("common_step") if isinstance(state, Mapping) else None  # of torch's own Adam in a plain optimizer
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, Mapping):
            said = {str(key): value for key, value in group.items() if key != "params"}
            yield said if step is None else {**said, "step": step}


def alike(group: Group) -> tuple[object, ...]:
    """Return what tells a group from others, but for whose parameters they are: megatron/core/optimizer/optimizer.py.

    Of 0.16 that is two factors and a flag; since 0.18 what a group may have of its own, too.
    """
    own = ("wd_mult", "lr_mult", "is_decoupled_lr", "max_lr", "min_lr", "start_wd", "end_wd", "optimizer")
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in own)


def common_state(training: Training, *, experts: bool, chained: bool) -> dict[str, Value]:
    """Return what the common state of a target says: of one optimizer, or of one more for experts that ranks share.

    Parameters of experts have groups of their own there and nowhere else, so that each is written as both.
    """
    groups: Value = [_plain(group) for group in _of_both(training.groups, experts=experts)]
    one: Mapping[str, Value] = {OPTIMIZER: {"param_groups": groups}, "param_state_sharding_type": FORM}
    return {
        OPTIMIZER: {0: one, 1: one} if chained else one,
        SCHEDULER: _plain(training.scheduler),
        OPERATIONS: training.operations,
    }


def iteration_of(training: Training | None) -> int:
    """Return the iteration of a checkpoint: 1 of one that begins a run, from where Megatron counts."""
    return 1 if training is None else training.iteration


def run_arguments(training: Training, *, tp: int, pp: int) -> dict[str, Value]:
    """Return what the arguments say of the run: how it is cut, by which Megatron decides what it may load, and what it has read."""
    cut = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return {
        **cut,
        "use_distributed_optimizer": True,
        "no_save_rng": True,
        "iteration": training.iteration,
        **_plain(training.samples),
    }


def _of_both(groups: Sequence[Group], *, experts: bool) -> Iterable[Group]:
    there = {(alike(group), bool(group.get(EXPERT))) for group in groups}
    for group in groups:
        yield group
        other = not group.get(EXPERT)
        if experts and (alike(group), other) not in there:
            yield {**group, EXPERT: other}


def _plain(said: Group) -> dict[str, Value]:
    return {key: value for key, value in said.items() if value is None or isinstance(value, str | int | float | bool | tuple)}
