"""The kernels of multisa: affinities, the random walk, the dense CRF, codecs of masks; NumPy in and out.

For example:

    from multisa.kernels import affinity_from_boundary, random_walk
    walked = random_walk(cam, affinity_from_boundary(boundary))
"""

from multisa.kernels.affinity import affinity_from_boundary, affinity_from_features
from multisa.kernels.deflate import deflate_mask
from multisa.kernels.dense_crf import CrfParameters, DenseCRF, dense_crf
from multisa.kernels.random_walk import random_walk
from multisa.kernels.reference import random_walk_reference
from multisa.kernels.rle import ClassRuns, encode_rle
from multisa.kernels.stencil import path_offsets, stencil_offsets

__all__ = [
    "ClassRuns",
    "CrfParameters",
    "DenseCRF",
    "affinity_from_boundary",
    "affinity_from_features",
    "deflate_mask",
    "dense_crf",
    "encode_rle",
    "path_offsets",
    "random_walk",
    "random_walk_reference",
    "stencil_offsets",
]
