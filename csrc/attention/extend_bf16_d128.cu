#include "attention/extend.cuh"
template void flashcore::extend::launch<__nv_bfloat16, 128>(const Params&, int, cudaStream_t);
