#include "scaled_dot_product_attention.cuh"
