"""Inference with NumPy and SciPy alone, for networks of dense and convolution layers.

This folder needs nothing else of the library, nor JAX: it may be copied. Each layer multiplies with
a dense or with a sparse (CSR) matrix, whichever took less time when the network was made. Where
Numba is installed, it compiles sparse layers for this processor, of which those in a row are one
call.
"""

from .network import Conv, Dense, Network, Pool, flatten, relu
from .timing import take_turns

__all__ = ("Conv", "Dense", "Network", "Pool", "flatten", "relu", "take_turns")
