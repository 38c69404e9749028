#include "diffusion.cuh"
