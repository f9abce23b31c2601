/* Preloaded (LD_PRELOAD), lets MKL choose on any processor the kernels that it has for Intel's of the same kind:
   with AVX-512 those pack matrices on the stack.

       cc -shared -fPIC -o as_on_intel.so scripts/soak/as_on_intel.c */

int mkl_serv_intel_cpu(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }
