#include "conv2d_epilogue_pass.cuh"
