"""Who holds up a step, by what the ranks last said."""

import pytest

from jaxserve.serving.multihost.progress import At, who_holds


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([At(7, 6), At(6, 6), At(7, 6)], "rank 1 has not begun it"),
        ([At(8, 6), At(7, 6), At(6, 5), At(5, 5)], "ranks 2 and 3 have not begun it"),
        ([At(6, 6), At(7, 6)], "rank 0 has not begun it"),
        # Rank 0 may be one plan further: the others take it up when this one has ended.
        ([At(8, 6), At(7, 6), At(7, 5)], "all ranks wait in it"),
        ([At(8, 6), At(8, 7), At(8, 6)], "ranks 0 and 2 have not ended it, the others have"),
        ([At(7, 6), At(6, 6), At(7, 6, 4.8)], "rank 2 has given no sign of life for 5 s"),
        ([At(7, 6), At(7, 6, 1.0)], "all ranks wait in it"),
    ],
)
def test_who_holds_a_plan(ranks: list[At], said: str) -> None:
    assert who_holds(7, dict(enumerate(ranks))) == said
