"""Looks into a forward of whole sequences, and changes it: what `LLM.run` compiles.

    look = inside(program, ("layers.*.resid", "logits"), {"layers.0.mlp": jnp.negative})
    found = jax.jit(look)(params, tokens)        # name -> array, in the forward's order

On a mesh the compiler divides the work by where the weights lie, instead of the program's own
collectives: every activation is then one array, whatever the layout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from jaxserve.errors import ContextLengthError, UsageError
from jaxserve.layers.cache import NoCache
from jaxserve.layers.decoder import Params, forward
from jaxserve.layers.step import Step
from jaxserve.layers.tap import Edit, Taps
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.serving.generation import Program
from jaxserve.serving.views import single, views

Look = Callable[..., OrderedDict[str, Array]]


def inside(
    program: Program, capture: Sequence[str], edit: Edit | None = None, stored: bool = True
) -> Look:
    """Returns a function (params, tokens int32[..., T], inputs=None) -> captured activations.

    Of each token they are [..., T, features], attention probabilities [..., N, T, T]. `inputs`
    take the place of the rows that the embedding has for the tokens. It can be differentiated.

    Args:
        stored: params are as the program stores them; else one by one, as `views` gives them.

    Raises:
        UsageError: `edit` is no mapping; from the function, when there are no tokens.
        ContextLengthError: from the function, when there are more than the context holds.
    """
    if edit is not None and not isinstance(edit, Mapping):
        raise UsageError(
            f"edit={edit!r:.80} is no mapping; use names with functions, such as "
            "{'layers.0.resid': lambda x: 0 * x}"
        )
    model, kernels = single(program.model), program.kernels
    if program.mesh is not None:
        kernels = kernel_set("xla")  # what the compiler can divide

    def look(params: Params, tokens: Array, inputs: Array | None = None) -> OrderedDict[str, Array]:
        if stored:
            params = views(program.model, params, None)
        shape = tokens.shape
        length, most = shape[-1], model.config.max_context_tokens
        if not tokens.size:
            raise UsageError(f"there are no tokens in {list(shape)}; give at least one")
        if length > most:
            raise ContextLengthError(
                f"a sequence of {length} tokens exceeds the context of {most}; shorten it"
            )
        batch = tokens.size // length
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        step = Step(tokens.reshape(-1), positions, jnp.full_like(positions, length))
        changes = {} if inputs is None else {"input": lambda x: inputs}
        taps = Taps(capture, changes | dict(edit or {}), shape)
        forward(model, params, step, NoCache(batch), LocalComm(), kernels, taps=taps)
        return OrderedDict(taps.captured)

    return look
