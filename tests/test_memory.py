"""Where arrays begin, and what becomes of their memory."""

import numpy as np

from nbrnn.kernels.memory import LINE, empty, in_turn, zeros


def test_arrays_begin_where_a_cache_line_does():
    for array in (empty((3, 5), "f4"), zeros((7,), "f8"), empty((3, 4, 1), "u2")):
        assert array.__array_interface__["data"][0] % LINE == 0
    assert not zeros((2, 9), "f4").any()


def test_arrays_in_turn_lie_in_the_same_memory():
    one, other, none = in_turn((3, 5), (2, 2, 7), (0, 4), dtype="f4")
    assert [one.shape, other.shape, none.shape] == [(3, 5), (2, 2, 7), (0, 4)]
    one[...] = np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(other.ravel()[:15], np.arange(15))
    assert other.size == 28
    other[...] = 1
    assert one.min() == one.max() == 1


def test_large_memory_goes_to_the_next_array_of_its_size():
    one = empty((3 << 20,), "f4")
    address, view = one.__array_interface__["data"][0], one[5:]
    del one
    other = empty((3 << 20,), "f4")  # while a view holds on to the first
    assert other.__array_interface__["data"][0] != address
    del view
    assert empty((6, 1 << 20), "u2").__array_interface__["data"][0] == address
