// All kernels as one translation unit, hence one fat binary.
#include "affinity.cuh"
#include "device.cuh"
#include "enlarge.cuh"
#include "label_maps.cuh"
#include "mean_field.cuh"
#include "sort.cuh"
#include "walk.cuh"
#include "walk_ends.cuh"
