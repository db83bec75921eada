"""Kernels are resolved by name, once, and refused by name."""

import pytest

from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels import BACKENDS, kernel_set, resolve
from jaxserve.pallas_kernels.attention import reference as attention_reference
from jaxserve.pallas_kernels.attention import xla as attention_xla
from jaxserve.pallas_kernels.matmul import reference as matmul_reference
from jaxserve.pallas_kernels.matmul import xla as matmul_xla


def test_an_operation_resolves_to_the_module_of_its_backend() -> None:
    assert resolve("attention", "reference") is attention_reference.attention
    assert resolve("attention", "xla") is attention_xla.attention
    assert resolve("matmul", "reference") is matmul_reference.matmul
    assert resolve("matmul", "xla") is matmul_xla.matmul


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_complete_and_hashable(backend: str) -> None:
    kernels = kernel_set(backend)
    assert kernels.backend == backend
    assert hash(kernels) == hash(kernel_set(backend))


def test_the_default_set_is_that_of_xla() -> None:
    assert kernel_set() == kernel_set("xla")


def test_an_unknown_backend_is_refused_by_name() -> None:
    message = "backend='cuda9' has no matmul kernel; use one of xla, reference, tpu"
    with pytest.raises(UnsupportedError, match=message):
        kernel_set("cuda9")
