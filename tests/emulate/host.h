// device.cuh for a CPU: the kernels, compiled by g++, run here one block after another, in an order given by a seed.
// The threads of a block are fibers. Each runs until it reaches a barrier, and between two barriers they run in
// shuffled order, so that what is not ordered by a barrier shows as a wrong result.
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
#define __shared__ static __attribute__((section("shared_memory")))
#define DEVICE [[maybe_unused]] static inline
#define UNROLL
#define UNROLL_READS
#define NO_UNROLL

using std::max;
using std::min;

DEVICE float add(float a, float b) { return a + b; }
DEVICE float sub(float a, float b) { return a - b; }
DEVICE float mul(float a, float b) { return a * b; }
DEVICE float div(float a, float b) { return a / b; }
DEVICE float round_up(float a) { return ceilf(a); }
DEVICE float round_down(int a, float) { const float r = (float)a; return (double)r > a ? nextafterf(r, 0) : r; }
DEVICE bool less(float a, float b) { return a < b; }
DEVICE bool at_least(float a, float b) { return a >= b; }
DEVICE double widen(float a) { return a; }
DEVICE float narrow(double a, float) { return (float)a; }
DEVICE double add(double a, double b) { return a + b; }
DEVICE double sub(double a, double b) { return a - b; }
DEVICE double mul(double a, double b) { return a * b; }
DEVICE double div(double a, double b) { return a / b; }
DEVICE double round_up(double a) { return ceil(a); }
DEVICE double round_down(int a, double) { return a; }
DEVICE bool less(double a, double b) { return a < b; }
DEVICE bool at_least(double a, double b) { return a >= b; }
DEVICE double widen(double a) { return a; }
DEVICE double narrow(double a, double) { return a; }
DEVICE float convert(float a, float) { return a; }
DEVICE double convert(float a, double) { return a; }
DEVICE double convert(double a, double) { return a; }
DEVICE double __longlong_as_double(long long bits) { double v; memcpy(&v, &bits, 8); return v; }
DEVICE float __uint_as_float(unsigned bits) { float v; memcpy(&v, &bits, 4); return v; }
DEVICE int __popc(unsigned bits) { return __builtin_popcount(bits); }
DEVICE int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
DEVICE unsigned __float_as_uint(float v) { unsigned bits; memcpy(&bits, &v, 4); return bits; }

struct Half { unsigned short bits; };

DEVICE float load(Half v) {
    const unsigned sign = (v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float magnitude = ldexpf((float)(exponent ? fraction | 1024 : fraction), (int)(exponent ? exponent : 1) - 25);
    return sign ? -magnitude : magnitude;
}

DEVICE void store(Half& to, float v) {
    const unsigned short sign = __float_as_uint(v) >> 16 & 0x8000u;
    const float magnitude = fabsf(v);
    if (magnitude != magnitude) { to.bits = sign | 0x7e00; return; }
    if (magnitude >= 65520.0f) { to.bits = sign | 0x7c00; return; }
    int exponent;
    frexpf(magnitude, &exponent);  // magnitude < 2 ** exponent
    const int unit = magnitude == 0 ? -24 : max(exponent - 11, -24);
    const unsigned steps = (unsigned)nearbyintf(ldexpf(magnitude, -unit));  // ties to even
    to.bits = sign | (unsigned short)(((unit + 24) << 10) + steps);
}

struct Dim3 { unsigned x, y, z; };
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

__shared__ __attribute__((used)) int always_some_shared_memory;  // so that its section exists

namespace emulation {
const size_t STACK = 128 << 10;
struct Fiber {
    std::vector<char> stack;
    jmp_buf paused;
    bool begun = false, done;  // begun: it has a stack frame to come back to
    const char* barrier;
    int vote;
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current, verdict;
static char message[200];
static void (*body)();

// Fibers change places by longjmp: swapcontext would ask the system twice each time.
__attribute__((noinline)) static void pause() {
    if (_setjmp(fibers[current].paused) == 0) _longjmp(scheduler, 1);
}

// A fiber runs the kernel again and again, for one block after another.
static void run() {
    for (;;) {
        body();
        fibers[current].done = true;
        pause();
    }
}

__attribute__((noinline)) static void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.paused, 1);
    fiber.begun = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    context.uc_link = nullptr;
    makecontext(&context, run, 0);
    setcontext(&context);
}

[[maybe_unused]] static int wait(const char* barrier, int vote) {
    fibers[current].barrier = barrier;
    fibers[current].vote = vote;
    pause();
    return verdict;
}

static bool run_block(int threads, std::mt19937& random) {
    extern char start __asm__("__start_shared_memory"), stop __asm__("__stop_shared_memory");
    memset(&start, 0xff, &stop - &start);  // a NaN, wherever a number is read before it is written
    std::vector<int> order(threads);
    for (int i = 0; i < threads; ++i) {
        order[i] = i;
        fibers[i].done = false;
    }
    for (int left = threads; left;) {
        std::shuffle(order.begin(), order.end(), random);
        for (int i : order) {
            if (fibers[i].done) continue;
            fibers[i].barrier = nullptr;
            current = i;
            threadIdx.x = i;
            resume(fibers[i]);
        }
        const char* barrier = nullptr;
        int votes = 0, waiting = 0;
        left = 0;
        for (int i = 0; i < threads; ++i) {
            const Fiber& fiber = fibers[i];
            if (fiber.done) continue;
            ++left;
            if (!barrier) barrier = fiber.barrier;
            if (barrier != fiber.barrier) {
                snprintf(message, sizeof message, "threads of a block wait at different barriers");
                return false;
            }
            ++waiting;
            votes |= fiber.vote;
        }
        if (waiting && waiting < threads) {
            snprintf(message, sizeof message, "%d of %d threads wait at a barrier that the others never reach", waiting, threads);
            return false;
        }
        verdict = votes;
    }
    return true;
}

static const char* launch(void (*kernel)(), long long blocks, int threads, unsigned seed) {
    body = kernel;
    if ((int)fibers.size() < threads) fibers.resize(threads);  // never fewer: their stacks are kept
    for (Fiber& fiber : fibers) fiber.stack.resize(STACK);
    if (message[0])  // in an earlier launch, which left fibers where they were
        for (Fiber& fiber : fibers) fiber.begun = false;
    gridDim = {(unsigned)blocks, 1, 1};
    blockDim = {(unsigned)threads, 1, 1};
    std::mt19937 random(seed);
    std::vector<long long> order(blocks);
    for (long long i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    message[0] = 0;
    for (long long block : order) {
        blockIdx = {(unsigned)block, 0, 0};
        if (!run_block(threads, random) || message[0]) return message;
    }
    return nullptr;
}

// The value of the thread `distance` before, which may be of another warp: where there is none in its own, the kernels do
// not look at it. All threads of a block must come here, not only those of a warp.
static std::vector<long long> shuffled;
[[maybe_unused]] static long long from_before(const char* place, long long value, int distance) {
    shuffled.resize(fibers.size());
    shuffled[current] = value;
    wait(place, 0);
    const long long before = current < distance ? -1 : shuffled[current - distance];
    wait(place, 0);
    return before;
}

[[maybe_unused]] static void check_alignment(const void* address, size_t alignment) {
    if ((size_t)address % alignment)
        snprintf(message, sizeof message, "an access of %zu bytes to an address that is no multiple of it", alignment);
}
}  // namespace emulation

template <typename Pack>
DEVICE Pack read_pack(const Pack* from) {
    emulation::check_alignment(from, alignof(Pack));
    Pack pack;
    memcpy((void*)&pack, (const void*)from, sizeof pack);
    return pack;
}
template <typename Pack>
DEVICE void write_pack(Pack* to, const Pack& pack) {
    emulation::check_alignment(to, alignof(Pack));
    memcpy((void*)to, (const void*)&pack, sizeof pack);
}

#define TEXT_OF(line) #line
#define PLACE(line) TEXT_OF(line)
#define __syncthreads() ((void)emulation::wait("sync at " PLACE(__LINE__), 0))
#define __shfl_up_sync(mask, value, distance) emulation::from_before("shuffle at " PLACE(__LINE__), value, distance)
#define __syncthreads_or(vote) emulation::wait("or at " PLACE(__LINE__), (vote) ? 1 : 0)
