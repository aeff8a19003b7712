"""Where a run has each layer, as megatron-core's own reckoning has it."""

from argparse import Namespace
from itertools import product

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from carnet.dialects.megatron.ranks import Pipeline, placed

pytestmark = pytest.mark.referee
RUNS = [  # layers, ranks, virtual stages, layers of the first rank, of the last, whether embedding and loss count as layers
    (8, 2, 1, None, None, False, False),
    (8, 4, 2, None, None, False, False),
    (24, 2, 3, None, None, False, False),
    (7, 2, 1, 3, None, False, False),
    (9, 4, 1, 1, 2, False, False),
    (10, 3, 1, None, 2, False, False),
    (16, 4, 2, 2, 2, False, False),
    (6, 2, 1, None, None, True, True),
    (7, 4, 2, None, None, True, False),
    (14, 4, 2, None, None, True, True),
]


@pytest.mark.parametrize(("layers", "ranks", "virtual", "first", "last", "embedding", "loss"), RUNS)
def test_layers_are_where_megatron_core_builds_them(layers, ranks, virtual, first, last, embedding, loss):
    said = Namespace(
        num_layers=layers,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )
    found = {"first": (0, 0), "last": (ranks - 1, virtual - 1)}
    for rank, turn in product(range(ranks), range(virtual)):
        stage = turn if virtual > 1 else None
        begin = get_transformer_layer_offset(said, stage, rank)
        found |= dict.fromkeys(range(begin, begin + get_num_layers_to_build(said, stage, rank)), (rank, turn))
    assert placed({"layers": layers}, Pipeline(ranks, virtual, first, last, embedding, loss)) == found


@pytest.mark.parametrize(
    ("layout", "ranks"), [("Et*3|(tt|)*29,m|L", 4), ("Et|t|tt|mL", 2), ("E|(t|)*6,tL", 8), ("Etttt|ttttL", 2)]
)
def test_layers_are_where_a_layout_says(layout, ranks):
    stages = PipelineParallelLayerLayout(layout, ranks).layout
    virtual = len(stages[0])
    every = [(kind.name, (rank, turn)) for turn in range(virtual) for rank in range(ranks) for kind in stages[rank][turn]]
    decoder, mtp = ([stage for kind, stage in every if kind == name] for name in ("decoder", "mtp"))
    ends = {name: dict(every)[kind] for name, kind in (("first", "embedding"), ("last", "loss"))}
    said = {"layers": len(decoder), "mtp": len(mtp)}
    found = placed(said, Pipeline(ranks, virtual, None, None, False, False, layout))
    assert found == {**ends, **dict(enumerate([*decoder, *mtp]))}
    assert placed({**said, "layers": len(decoder) + 1}, Pipeline(ranks, virtual, None, None, False, False, layout)) == {}


def test_layers_that_stages_cannot_share_are_nowhere():
    assert placed({"layers": 7}, Pipeline(2, 1, None, None, False, False)) == {}
