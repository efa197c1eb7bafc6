#include "attention/extend.cuh"
template void flashcore::extend::launch<__half, 256>(const Params&, int, cudaStream_t);
