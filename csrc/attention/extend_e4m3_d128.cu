#include "attention/extend.cuh"
template void flashcore::extend::launch<flashcore::E4m3, 128>(const Params&, int, cudaStream_t);
