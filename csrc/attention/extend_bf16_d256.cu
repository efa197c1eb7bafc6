#include "attention/extend.cuh"
template void flashcore::extend::launch<__nv_bfloat16, 256>(const Params&, int, cudaStream_t);
