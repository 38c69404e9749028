#include "tree_lstm.cuh"
