#include "group_norm.cuh"
