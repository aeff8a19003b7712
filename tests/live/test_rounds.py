"""Rounds of moves: no rank has more than a bucket in one, nothing is lost, and they are few."""

from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.algebra.box import whole
from carnet.live.moves import Spot, Transfer, by_tensor, rounds

BUCKET = 1 << 10


def move(name, sender, receiver, rows):
    return Transfer(name, whole((rows, 8)), sender, receiver, Spot("f", name, 0, (rows, 8), (8, 1)), "bf16", 0.0, None)


MOVES = st.lists(
    st.builds(move, st.text("abcdef", min_size=1, max_size=2), st.integers(0, 3), st.integers(0, 3), st.integers(1, 64)),
    max_size=60,
)


@given(MOVES)
@settings(max_examples=200, deadline=None)
def test_no_rank_sends_or_receives_more_than_a_bucket_in_a_round(found):
    made = rounds(([each] for each in found), BUCKET)
    assert sorted(map(id, found)) == sorted(id(each) for group in made for each in group)
    for group in made:
        for rank in range(4):
            away = [each for each in group if each.sender != each.receiver]
            assert sum(each.nbytes for each in away if each.sender == rank) <= BUCKET
            assert sum(each.nbytes for each in away if each.receiver == rank) <= BUCKET


@given(MOVES)
@settings(max_examples=200, deadline=None)
def test_a_tensor_that_is_handed_on_whole_arrives_in_one_round(found):
    made = rounds(by_tensor(found), BUCKET, kept=True)
    places = [{each.spot.name for each in group} for group in made]
    assert all(not one & other for at, one in enumerate(places) for other in places[at + 1 :])
    assert {name for names in places for name in names} == {each.spot.name for each in found}
    for group, names in zip(made, places, strict=True):
        for rank in range(4):
            held = sum(each.nbytes for each in group if each.receiver == rank)
            assert held <= BUCKET or any(
                sum(each.nbytes for each in group if each.receiver == rank and each.spot.name == name) > BUCKET
                for name in names
            )


def test_ranks_that_have_nothing_to_do_with_each_other_do_not_wait_for_each_other():
    one_after_the_other = [move(f"t{number}", number % 2, 2 + number % 2, 64) for number in range(40)]
    assert len(rounds(([each] for each in one_after_the_other), BUCKET)) == 20
    to_all = [move(f"t{number}", number // 20, receiver, 64) for number in range(40) for receiver in (2, 3)]
    assert len(rounds(([each] for each in to_all), BUCKET)) <= 42
