#include "conv2d_prologue.cuh"
