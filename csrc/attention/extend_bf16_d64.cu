#include "attention/extend.cuh"
template void flashcore::extend::launch<__nv_bfloat16, 64>(const Params&, int, cudaStream_t);
