"""When a lost engine is no longer waited for."""

from jaxserve.serving.recovery import MOST_RESTARTS, Recovery


def test_a_lost_engine_has_the_time_of_a_start() -> None:
    recovery = Recovery(within_s=100.0)
    assert not recovery.given_up(False, 0, 1000.0)
    assert not recovery.given_up(True, 0, 2000.0)  # it counts from here
    assert not recovery.given_up(True, 1, 2100.0)
    assert recovery.given_up(True, 1, 2101.0)


def test_an_engine_that_came_back_has_it_again() -> None:
    recovery = Recovery(within_s=100.0)
    assert not recovery.given_up(True, 5, 0.0)
    assert not recovery.given_up(False, 6, 90.0)
    assert not recovery.given_up(True, 6, 95.0)
    assert not recovery.given_up(True, 7, 190.0)
    assert recovery.given_up(True, 7, 196.0)


def test_one_that_dies_of_every_start_is_given_up_sooner() -> None:
    recovery = Recovery(within_s=1000.0)
    assert not recovery.given_up(True, 7, 0.0)
    assert not recovery.given_up(True, 7 + MOST_RESTARTS, 5.0)
    assert recovery.given_up(True, 8 + MOST_RESTARTS, 6.0)
