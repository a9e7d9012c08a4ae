"""A failed actor is started again, until failing has gone too far."""

from __future__ import annotations

import pytest

from rlx.cluster.faults import Cause, History, Restarts, same_error


def history(**changes: float) -> History:
    settings = {
        "window_s": 100.0, "max_raised": 3, "max_fruitless": 4,
        "first_wait_s": 1.0, "longest_wait_s": 5.0,
    }  # fmt: skip
    return History(restarts=Restarts(**settings | changes))  # type: ignore[arg-type]


def test_waits_double_while_lives_end_without_an_answer_and_start_again_after_one():
    actor = history()
    assert [actor.note_failure(t, "died") for t in (0, 1, 2, 3)] == [1.0, 2.0, 4.0, 5.0]
    actor.note_answer()
    assert actor.note_failure(4, "died") == 1.0
    assert actor.note_failure(5, "died") == 1.0
    assert actor.note_failure(6, "died") == 2.0


@pytest.mark.parametrize("cause", ["died", "hung", "lost_object"])
def test_an_actor_that_answers_may_be_killed_for_ever(cause: Cause):
    actor = history()
    for t in range(50):
        actor.note_answer()
        actor.note_failure(t, cause)
        assert actor.too_much() == ""
    assert actor.counts[cause] == 50


def test_exceptions_count_though_the_actor_answered_between_them():
    actor = history()
    for t in range(3):
        assert actor.too_much() == ""
        actor.note_answer()
        actor.note_failure(t, "raised", "ValueError: x")
    assert actor.too_much() == "raised 3 times within 100 s"


def test_deaths_before_any_answer_are_counted_and_forgotten_after_the_window():
    actor = history()
    for t in range(3):
        actor.note_failure(t, "died")
    assert actor.too_much() == ""
    actor.note_failure(102.5, "died")  # the first three are out of the window of 100 s
    assert actor.too_much() == ""
    for t in (103, 104, 105):
        actor.note_failure(t, "died")
    assert actor.too_much() == "ended 4 times within 100 s without any answer"


def test_hangs_in_a_row_are_counted_however_long_they_take():
    """Each lasts until the deadline: the window would never see enough of them."""
    actor = history()
    for t in (0, 500):
        actor.note_failure(t, "hung")
    assert actor.too_much() == ""
    actor.note_answer()
    for t in (1000, 1500):
        actor.note_failure(t, "hung")
    actor.note_answer()
    actor.note_failure(2000, "hung")  # it had answered
    for t in (2500, 3000):
        actor.note_failure(t, "hung")
    assert actor.too_much() == ""
    actor.note_failure(3500, "hung")
    assert actor.too_much() == "hung 3 times in a row without any answer"


def test_the_same_exception_from_every_actor_is_no_accident():
    actors = [history() for _ in range(3)]
    for actor in actors[:2]:
        actor.note_failure(0, "raised", "ValueError: x")
    assert same_error(actors) == ""
    actors[2].note_failure(0, "raised", "ValueError: y")
    assert same_error(actors) == ""
    actors[2].note_failure(1, "raised", "ValueError: x")
    assert same_error(actors) == "ValueError: x"
    actors[0].note_answer()
    assert same_error(actors) == ""
    assert same_error([]) == same_error(actors[2:]) == ""  # one alone says nothing
