#include "cuda/common.cuh"
