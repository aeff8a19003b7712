"""The lists of what is not quantized are those that ModelOpt writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.planner.choosing import summarized

pytestmark = pytest.mark.filterwarnings("ignore")  # of the programs, at import

PARTS = st.sampled_from(["layers", "1", "10", "mlp", "mlp_norm", "up", "up_proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@pytest.fixture(scope="module")
def theirs():
    from modelopt.torch.export.quant_utils import _prefix_wildcard_summarize_exclude_modules

    return _prefix_wildcard_summarize_exclude_modules


@pytest.mark.referee
@given(coded=st.dictionaries(NAMES, st.booleans(), max_size=12))
def test_parts_in_which_nothing_is_coded_are_named_by_modelopt_s_patterns(coded, theirs):
    plain, others = ([name for name, is_coded in coded.items() if is_coded == wanted] for wanted in (False, True))
    assert {*summarized(plain, others)} == theirs(plain, others)
