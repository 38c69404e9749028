#include "recurrent.cuh"
