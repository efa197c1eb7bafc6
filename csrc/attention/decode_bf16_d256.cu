#include "attention/decode.cuh"
template void flashcore::launch_decode<__nv_bfloat16, 256>(const DecodeParams&, int, cudaStream_t);
