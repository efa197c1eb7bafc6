#include "attention/extend.cuh"
template void flashcore::extend::launch<__half, 64>(const Params&, int, cudaStream_t);
