"""The native operators as PyTorch knows them (`ops.registration`); the library in C++ adds how to run them."""

from ..registration import register

#: As in mixer.h.
_CHUNK = 64
_SHORT, _LONGEST = 5 * _CHUNK, 80


def chunk_of(length: int) -> int:
    """Tokens of a chunk, as in mixer.h."""
    if length > _SHORT:
        return _CHUNK
    count = (length + _LONGEST - 1) // _LONGEST
    return (length + count - 1) // count


_LIBRARY, OPS = register("vit_linearizer_native", chunk_of, "set VIT_LINEARIZER_NATIVE=0")
_LIBRARY.define("fingerprint(Tensor t) -> int")
