#include "conv2d.cuh"
