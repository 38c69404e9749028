#include "layer_norm_lstm.cuh"
