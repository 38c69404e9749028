#include "additive_attention.cuh"
