#include "attention/decode.cuh"
template void flashcore::launch_decode<__half, 64>(const DecodeParams&, int, cudaStream_t);
