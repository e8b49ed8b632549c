// What the kernels ask of the machine they run on: arithmetic that is rounded at each operation, comparisons, float16.
//
// The operations on floats are written in PTX, because the compiler is told to flush subnormal numbers to zero
// (CuPy always tells it so), and does that to intrinsics too. An image's edge at 0 tells a subnormal from 0. Doubles
// would tell as well, but many GPUs take 64 times as long for them.

#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_READS _Pragma("unroll READS")
#define NO_UNROLL _Pragma("unroll 1")

DEVICE float add(float a, float b) { float r; asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float sub(float a, float b) { float r; asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float mul(float a, float b) { float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float div(float a, float b) { float r; asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float round_up(float a) { float r; asm("cvt.rpi.f32.f32 %0, %1;" : "=f"(r) : "f"(a)); return r; }
DEVICE float round_down(int a, float) { float r; asm("cvt.rm.f32.s32 %0, %1;" : "=f"(r) : "r"(a)); return r; }
DEVICE bool less(float a, float b) {
    int r;
    asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.s32 %0, 1, 0, p; }" : "=r"(r) : "f"(a), "f"(b));
    return r;
}
DEVICE bool at_least(float a, float b) {
    int r;
    asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; selp.s32 %0, 1, 0, p; }" : "=r"(r) : "f"(a), "f"(b));
    return r;
}
DEVICE double widen(float a) { double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(a)); return r; }
DEVICE float narrow(double a, float) { float r; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(a)); return r; }

DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
DEVICE double sub(double a, double b) { return __dsub_rn(a, b); }
DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
DEVICE double div(double a, double b) { return __ddiv_rn(a, b); }
DEVICE double round_up(double a) { return ceil(a); }
DEVICE double round_down(int a, double) { return a; }
DEVICE bool less(double a, double b) { return a < b; }
DEVICE bool at_least(double a, double b) { return a >= b; }
DEVICE double widen(double a) { return a; }
DEVICE double narrow(double a, double) { return a; }
DEVICE float convert(float a, float) { return a; }
DEVICE double convert(float a, double) { return widen(a); }
DEVICE double convert(double a, double) { return a; }

struct Half { unsigned short bits; };

DEVICE float load(Half v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)); return r; }
DEVICE void store(Half& to, float v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }

// All of a pack by one access; its address is a multiple of its alignment.
template <typename Pack>
DEVICE Pack read_pack(const Pack* from) { return *from; }
template <typename Pack>
DEVICE void write_pack(Pack* to, const Pack& pack) { *to = pack; }
