#include "rotary_embedding.cuh"
