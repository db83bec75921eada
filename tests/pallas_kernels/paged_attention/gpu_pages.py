"""The kernel for Hopper beside the definition, on the same random pages, interpreted."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.hopper import interpreter
from jaxserve.pallas_kernels.paged_attention import gpu, reference
from jaxserve.pallas_kernels.paged_attention.gpu_tiles import Tile
from jaxserve.pallas_kernels.paged_attention.places import Extra

from .random_pages import Both, Case, arrays, filled, options


def gpu_pages(plain: reference.Pages) -> gpu.Pages:
    """Returns the definition's pages as the kernel keeps them."""

    def turned(x: Any) -> Any:
        return jnp.asarray(np.asarray(x).swapaxes(1, 2))

    scales = plain.scales and (turned(plain.scales[0]), turned(plain.scales[1]))
    return gpu.Pages(turned(plain.keys), turned(plain.values), scales or None)


def both(case: Case, tile: Tile, seed: int = 0) -> Both:
    """Returns what kernel and definition make of the same call; a race is an error."""
    rng = np.random.default_rng(seed)
    plain, _ = filled(case, rng)
    q, *others = arrays(case, rng)
    table, q_start, kv_len, q_pos = others
    rest = table, q_start, kv_len, q_pos, case.spec
    given: dict[str, Any] = {
        "page_size": case.page_size,
        "pinned_pages": case.pinned,
        "sink_tokens": case.sinks,
        "max_query": case.max_query,
        "outputs": (Extra.LSE,),
        **options(case, rng, q.shape[0]),
    }
    wanted = reference.paged_attention(q, plain, *rest, **given)
    found = gpu.paged_attention(
        q, gpu_pages(plain), *rest, **given, tile=tile, interpret=interpreter()
    )

    def floats(pair: Any) -> tuple[np.ndarray, np.ndarray]:
        out, lse = (np.asarray(x.astype(jnp.float32)) for x in pair)
        return out, lse

    return Both(floats(found), floats(wanted))
