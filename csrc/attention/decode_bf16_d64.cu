#include "attention/decode.cuh"
template void flashcore::launch_decode<__nv_bfloat16, 64>(const DecodeParams&, int, cudaStream_t);
