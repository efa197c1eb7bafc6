#include "attention/decode.cuh"
template void flashcore::launch_decode<__half, 128>(const DecodeParams&, int, cudaStream_t);
