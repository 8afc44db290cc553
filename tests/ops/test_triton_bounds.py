"""Every address that a kernel reads or writes lies in one of the tensors that it is given.

On a GPU a stray address is an error that ends the process, or another tensor's numbers; the interpreter, which reads
whatever lies there, is asked to look at each.
"""

import numpy as np
import pytest
import torch
from operator_inputs import with_gradients

import hf_rfa

pytest.importorskip("triton")
from test_triton import DEVICE, parameters, small
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is not in use")


class Watched:
    """Stands in for the interpreter's memory accesses and looks at the addresses first."""

    def __init__(self, accesses):
        self._accesses, self.tensors, self.seen = accesses, [], 0

    def __getattr__(self, name):
        return getattr(self._accesses, name)

    def load(self, pointers, mask, *others):
        self._look(pointers, mask)
        return self._accesses.load(pointers, mask, *others)

    def store(self, pointers, values, mask):
        self._look(pointers, mask)
        return self._accesses.store(pointers, values, mask)

    def atomic_rmw(self, operation, pointers, values, mask, order):
        self._look(pointers, mask)
        return self._accesses.atomic_rmw(operation, pointers, values, mask, order)

    def _look(self, pointers, mask):
        wanted = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        inside = np.zeros(wanted.shape, dtype=bool)
        for begin, size in self.tensors:
            inside |= (wanted >= begin) & (wanted < begin + size)
        self.seen += wanted.size
        assert inside.all(), f"{(~inside).sum()} of {wanted.size} addresses are in none of the kernel's tensors"


@pytest.fixture
def watched(monkeypatch):
    watched = Watched(interpreter._interpreter)
    call = interpreter.GridExecutor.__call__

    def launch(executor, *arguments, **settings):
        tensors = [x for x in (*arguments, *settings.values()) if isinstance(x, torch.Tensor)]
        watched.tensors = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors]
        return call(executor, *arguments, **settings)

    monkeypatch.setattr(interpreter, "_interpreter", watched)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return watched


#: Value dims that are one tile, several, and no whole number of tiles.
@pytest.mark.parametrize(
    ("kept_keys", "value_dim", "heads", "options"),
    [
        (0, 64, 2, {"window": 16, "sink_tokens": 3}),
        (0, 40, 1, {"window": 0}),
        (5, 96, 2, {"window": 8, "sink_tokens": 3}),
        (40, 12, 1, {"window": 16, "sink_tokens": 0}),
    ],
)
def test_of_both_passes(watched, kept_keys, value_dim, heads, options):
    inputs = small(70, value_dim=value_dim, heads=heads, key_heads=1)
    inputs |= parameters(inputs, "hyperbolic")
    options = {"feature_map": "hyperbolic", "kept_keys": kept_keys, **options}
    with_gradients(hf_rfa.rfa_attention, inputs, backend="triton", **options)
    assert watched.seen > 10_000


def test_it_sees_an_address_that_is_in_no_tensor(watched):
    import triton.language as tl
    from triton import jit

    @jit
    def beyond(x, N: tl.constexpr):
        tl.store(x + tl.arange(0, N), tl.load(x + tl.arange(0, N)))

    whole = torch.zeros(16)
    beyond[(1,)](whole, N=16)
    with pytest.raises(Exception, match="4 of 16 addresses"):
        beyond[(1,)](torch.zeros(12), N=16)
