"""The kernels of multisa: affinities, random walk, dense CRF, class maps, codecs of masks; NumPy in and out.

For example:

    from multisa.kernels import affinity_from_boundary, random_walk
    walked = random_walk(cam, affinity_from_boundary(boundary))
"""

from multisa.kernels.affinity import affinity_from_boundary, affinity_from_features
from multisa.kernels.deflate import deflate_mask
from multisa.kernels.dense_crf import CrfParameters, DenseCRF, dense_crf
from multisa.kernels.histogram import histogram, joint_histogram
from multisa.kernels.label_maps import argmax_labels, resize_maps, scores_to_probabilities
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
    "argmax_labels",
    "deflate_mask",
    "dense_crf",
    "encode_rle",
    "histogram",
    "joint_histogram",
    "path_offsets",
    "random_walk",
    "random_walk_reference",
    "resize_maps",
    "scores_to_probabilities",
    "stencil_offsets",
]
