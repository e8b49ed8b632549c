// What CuPy asks of NVIDIA's driver (cu...) and of the CUDA runtime that is linked into it (cuda...), without a device:
// memory is the machine's, and full of NaN at first; a stream has nothing to wait for; modules and launches go to
// real_cupy.py. Declarations are as far as a call needs them.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DEVICES = 2, MAJOR = 75, MINOR = 76, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_SUPPORTED = 801 };

typedef void* Pointer;

static int capability, version;
static __thread int current;
static int (*on_load)(Pointer module, const void* image);
static int (*on_function)(Pointer module, const char* name, Pointer function);
static int (*on_launch)(Pointer function, const unsigned* grid_and_block, void** arguments);

void set_up(int of_capability, int of_cuda, Pointer load, Pointer function, Pointer launch) {
    capability = of_capability;
    version = of_cuda;
    on_load = load;
    on_function = function;
    on_launch = launch;
}

int missing(const char* name) {
    fprintf(stderr, "driver.c has no %s\n", name);
    return NOT_SUPPORTED;
}

static int handle(Pointer* to) { return (*to = malloc(1)) ? 0 : OUT_OF_MEMORY; }

// ---- the driver ----

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* to) { *to = version; return 0; }
int cuGetErrorName(int error, const char** name) { *name = "an error of driver.c"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "see above"; return 0; }
int cuCtxGetCurrent(Pointer* to) { *to = &current; return 0; }
int cuCtxSetCurrent(Pointer context) { return 0; }
int cuGetExportTable(const void** to, const void* id) { static size_t empty[8] = {sizeof empty[0]}; *to = empty; return 0; }

int cuModuleLoadData(Pointer* module, const void* image) { return handle(module) ? OUT_OF_MEMORY : on_load(*module, image); }
int cuModuleUnload(Pointer module) { return 0; }
int cuModuleGetFunction(Pointer* function, Pointer module, const char* name) {
    return handle(function) ? OUT_OF_MEMORY : on_function(module, name, *function);
}
int cuFuncGetAttribute(int* to, int attribute, Pointer function) { *to = 0; return 0; }  // registers and the like
int cuLaunchKernel(Pointer function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, Pointer stream, void** arguments, void** extra) {
    const unsigned sizes[6] = {grid_x, grid_y, grid_z, block_x, block_y, block_z};
    return on_launch(function, sizes, arguments);
}

// ---- the runtime ----

int cudaDriverGetVersion(int* to) { return cuDriverGetVersion(to); }
int cudaGetDeviceCount(int* to) { *to = DEVICES; return 0; }
int cudaGetDevice(int* to) { *to = current; return 0; }
int cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    current = device;
    return 0;
}
int cudaDeviceGetAttribute(int* to, int attribute, int device) {
    *to = attribute == MAJOR ? capability / 10 : attribute == MINOR ? capability % 10 : 0;
    return 0;
}
static int properties(char* name) { strcpy(name, "a stand-in for a GPU"); return 0; }  // of which the name comes first
int cudaGetDeviceProperties(char* to, int device) { return properties(to); }
int cudaGetDeviceProperties_v2(char* to, int device) { return properties(to); }
struct Attributes { int type, device; Pointer on_device, on_host; };
int cudaPointerGetAttributes(struct Attributes* to, const void* pointer) {
    *to = (struct Attributes){2, current, (Pointer)pointer, (Pointer)pointer};
    return 0;
}

int cudaMalloc(Pointer* to, size_t bytes) {
    if (posix_memalign(to, 512, bytes)) return OUT_OF_MEMORY;
    memset(*to, 0xFF, bytes);
    return 0;
}
int cudaMemGetInfo(size_t* free, size_t* total) { *free = *total = (size_t)1 << 34; return 0; }
int cudaFree(Pointer memory) { free(memory); return 0; }
int cudaHostAlloc(Pointer* to, size_t bytes, unsigned flags) { return cudaMalloc(to, bytes); }
int cudaFreeHost(Pointer memory) { return cudaFree(memory); }
int cudaMemcpy(Pointer to, const void* from, size_t bytes, int kind) { memmove(to, from, bytes); return 0; }
int cudaMemcpyAsync(Pointer to, const void* from, size_t bytes, int kind, Pointer stream) { return cudaMemcpy(to, from, bytes, kind); }
int cudaMemset(Pointer to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int cudaMemsetAsync(Pointer to, int value, size_t bytes, Pointer stream) { return cudaMemset(to, value, bytes); }

int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamCreate(Pointer* to) { return handle(to); }
int cudaStreamCreateWithFlags(Pointer* to, unsigned flags) { return handle(to); }
int cudaStreamCreateWithPriority(Pointer* to, unsigned flags, int priority) { return handle(to); }
int cudaStreamDestroy(Pointer stream) { return 0; }
int cudaStreamSynchronize(Pointer stream) { return 0; }
int cudaStreamIsCapturing(Pointer stream, int* to) { *to = 0; return 0; }
int cudaStreamWaitEvent(Pointer stream, Pointer event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(Pointer* to, unsigned flags) {
    return (*to = calloc(1, sizeof(struct timespec))) ? 0 : OUT_OF_MEMORY;
}
int cudaEventRecord(struct timespec* event, Pointer stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cudaEventQuery(Pointer event) { return 0; }
static int elapsed(float* ms, const struct timespec* start, const struct timespec* stop) {
    *ms = 1e3 * (stop->tv_sec - start->tv_sec) + 1e-6 * (stop->tv_nsec - start->tv_nsec);
    return 0;
}
int cudaEventElapsedTime(float* ms, Pointer start, Pointer stop) { return elapsed(ms, start, stop); }
int cudaEventElapsedTime_v2(float* ms, Pointer start, Pointer stop) { return elapsed(ms, start, stop); }
int cudaEventSynchronize(Pointer event) { return 0; }
int cudaEventDestroy(Pointer event) { return 0; }

int cudaGetLastError(void) { return 0; }
const char* cudaGetErrorName(int error) { return "an error of driver.c"; }
const char* cudaGetErrorString(int error) { return "see above"; }
