// The kernels for any processor, in vectors of four: SSE2 on x86-64, NEON on aarch64.
#define MULTISA_ISA portable
#define MULTISA_WIDTH 4
#define MULTISA_TABLE PORTABLE_KERNELS
#include "kernels.inc"
