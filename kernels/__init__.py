"""The kernels of multisa: affinities, random walk, dense CRF, enlarging, statistics, parts and codecs of masks.

NumPy arrays in and out. The first four also run on an NVIDIA GPU and take device arrays. Importing this
package loads neither PyTorch nor CUDA.

    from multisa.kernels import affinity_from_boundary, random_walk
    walked = random_walk(cam, affinity_from_boundary(boundary))     # [C, h, w] scores, [h, w] boundary

| name | what it does | source |
|---|---|---|
| `affinity_from_features`, `affinity_from_boundary` | affinities of pixel pairs | AffinityNet, irn |
| `stencil_offsets`, `path_offsets` | the pairs of an affinity array, the path between two pixels | psa, irn |
| `random_walk`, `random_walk_reference` | spread class scores along affinities; in float64 | AffinityNet |
| `dense_crf`, `DenseCRF`, `CrfParameters` | refine probabilities along image edges | pydensecrf |
| `enlarge_probabilities` | bilinear resizing and argmax in one pass | PyTorch's interpolate |
| `absorb_small_parts` | give small connected parts of a mask to a neighbour | scipy.ndimage.label |
| `histogram`, `joint_histogram` | count the values of masks | numpy.bincount |
| `encode_rle`, `ClassRuns` | run lengths of every class | pycocotools |
| `deflate_mask` | the image data of a palette PNG | zlib |
| `confidence_levels` | probabilities to uint8 | the segmenter's graph |

Shapes, dtypes, ranges and errors are in the docstring of each function.
"""

from multisa.kernels.affinity import affinity_from_boundary, affinity_from_features
from multisa.kernels.common.crf import CrfParameters
from multisa.kernels.common.stencil import path_offsets, stencil_offsets
from multisa.kernels.dense_crf import DenseCRF, dense_crf
from multisa.kernels.enlarge import enlarge_probabilities
from multisa.kernels.masks import (
    ClassRuns,
    absorb_small_parts,
    confidence_levels,
    deflate_mask,
    encode_rle,
    histogram,
    joint_histogram,
)
from multisa.kernels.random_walk import random_walk, random_walk_reference

__all__ = [
    "ClassRuns",
    "CrfParameters",
    "DenseCRF",
    "absorb_small_parts",
    "affinity_from_boundary",
    "affinity_from_features",
    "confidence_levels",
    "deflate_mask",
    "dense_crf",
    "encode_rle",
    "enlarge_probabilities",
    "histogram",
    "joint_histogram",
    "path_offsets",
    "random_walk",
    "random_walk_reference",
    "stencil_offsets",
]
