#include "attention/decode.cuh"
template void flashcore::launch_decode<flashcore::E4m3, 64>(const DecodeParams&, int, cudaStream_t);
