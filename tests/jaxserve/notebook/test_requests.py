"""What counts as one prompt, and what as none."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import UsageError
from jaxserve.notebook.requests import is_single


def test_text_and_flat_token_ids_are_one_prompt_and_lists_of_them_many() -> None:
    for one in ("text", "", [1, 2], (1, 2), np.arange(3)):
        assert is_single(one)
    for many in ([], ["a", [1]], [""], [[]], np.ones((2, 3), np.int32), [np.arange(3)]):
        assert not is_single(many)


@pytest.mark.parametrize(
    "prompts", [5, None, b"text", [1.5], [b"text"], [1, "a"], {"a": 1}, jnp.arange(3)]
)
def test_what_is_neither_text_nor_token_ids_is_refused(prompts: Any) -> None:
    with pytest.raises(UsageError, match="a prompt is text or a list of token ids"):
        is_single(prompts)
