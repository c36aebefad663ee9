/* A stand-in CUDA device: memory is the host's, copies are real, launched kernels do nothing.
 *
 * It lets vLLM's CUDA path run on a machine without a GPU: PyTorch's allocator, stream capture,
 * Inductor, Triton and ptxas do their real work, only no kernel ever runs. So it shows crashes,
 * wrong devices, wrong dtypes and wrong addresses, and nothing of a result.
 *
 * Built as libcuda.so.1, which holds the driver API, and preloaded, so that its runtime API and its
 * cuBLAS come before the real ones. build.py adds a function that returns 0 for every other symbol
 * that torch, vLLM and Triton ask for. Attributes are those of an H100, for which Triton compiles.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NAME "NVIDIA H100 80GB HBM3"
#define TOTAL 85520809984UL /* bytes of device memory that are reported */
#define LARGE (64UL << 20)  /* larger copies and fills are skipped: they would make pages real */

/* -- Memory: anonymous mappings, whose pages exist once they are written. ---------------------- */

typedef struct Block {
  char *start;
  size_t size;
  int on_host;
  struct Block *next;
} Block;
static Block *blocks;
static size_t used = 512UL << 20;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t allocate(void **pointer, size_t size, int on_host) {
  size = (size + 4096) & ~4095UL;
  if (!on_host && used + size > TOTAL) return cudaErrorMemoryAllocation;
  void *start = mmap(0, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  Block *block = malloc(sizeof *block);
  *pointer = start;
  pthread_mutex_lock(&lock);
  *block = (Block){start, size, on_host, blocks};
  blocks = block;
  if (!on_host) used += size;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

static cudaError_t release(void *start) {
  pthread_mutex_lock(&lock);
  for (Block **at = &blocks; *at; at = &(*at)->next) {
    Block *block = *at;
    if (block->start != start) continue;
    *at = block->next;
    if (!block->on_host) used -= block->size;
    munmap(block->start, block->size);
    free(block);
    break;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

/* 0: none of ours; else cudaMemoryTypeHost or cudaMemoryTypeDevice. */
static int kind_of(const void *pointer) {
  int kind = 0;
  pthread_mutex_lock(&lock);
  for (Block *b = blocks; b && !kind; b = b->next)
    if ((char *)pointer >= b->start && (char *)pointer < b->start + b->size)
      kind = b->on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  pthread_mutex_unlock(&lock);
  return kind;
}

static cudaError_t copy(void *to, const void *from, size_t size) {
  if (size < LARGE) memmove(to, from, size);
  return cudaSuccess;
}

static cudaError_t fill(void *to, int value, size_t size) {
  if (size < LARGE) memset(to, value, size);
  return cudaSuccess;
}

/* A handle of a stream, an event, a graph: any number that is not 0 and not given out before. */
static void *handle(void) {
  static long last = 0x100;
  return (void *)__sync_add_and_fetch(&last, 0x10);
}

/* The driver's numbers of attributes are the runtime's. What is not named is 0: not supported. */
static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxPitch: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrAsyncEngineCount:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCooperativeLaunch: return 1;
  }
  return 0;
}

/* -- Runtime API ------------------------------------------------------------------------------- */

#define SET(function, arguments, ...) \
  cudaError_t function arguments { __VA_ARGS__; return cudaSuccess; }

SET(cudaGetDeviceCount, (int *count), *count = 1)
SET(cudaGetDevice, (int *device), *device = 0)
SET(cudaDriverGetVersion, (int *version), *version = 13000)
SET(cudaRuntimeGetVersion, (int *version), *version = 13000)
SET(cudaDeviceGetAttribute, (int *value, enum cudaDeviceAttr which, int device),
    *value = attribute(which))
SET(cudaMemGetInfo, (size_t *left, size_t *total), *left = TOTAL - used; *total = TOTAL)
SET(cudaDeviceGetStreamPriorityRange, (int *least, int *greatest), *least = 0; *greatest = -5)
SET(cudaDeviceCanAccessPeer, (int *can, int device, int peer), *can = 0)
SET(cudaDeviceGetPCIBusId, (char *id, int size, int device), snprintf(id, size, "0000:00:00.0"))

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, NAME);
  p->totalGlobalMem = TOTAL;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
  p->warpSize = p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->canMapHostMemory = 1;
  p->asyncEngineCount = 1;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t size) { return allocate(p, size, 0); }
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return allocate(p, size, 0); }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) { return allocate(p, size, 1); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return release(p); }
cudaError_t cudaFreeHost(void *p) { return release(p); }
SET(cudaHostGetDevicePointer, (void **device, void *host, unsigned flags), *device = host)

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  int kind = kind_of(pointer);
  memset(found, 0, sizeof *found);
  found->type = kind;
  found->devicePointer = (void *)pointer;
  found->hostPointer = kind == cudaMemoryTypeHost ? (void *)pointer : 0;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return copy(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return fill(to, value, size); }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  return fill(to, value, size);
}

/* Streams and events: whatever is queued is done at once, so all events are over. */
SET(cudaStreamCreate, (cudaStream_t *stream), *stream = handle())
SET(cudaStreamCreateWithPriority, (cudaStream_t *stream, unsigned flags, int priority),
    *stream = handle())
SET(cudaStreamGetPriority, (cudaStream_t stream, int *priority), *priority = 0)
SET(cudaEventCreate, (cudaEvent_t *event), *event = handle())
SET(cudaEventCreateWithFlags, (cudaEvent_t *event, unsigned flags), *event = handle())
SET(cudaEventElapsedTime, (float *ms, cudaEvent_t start, cudaEvent_t end), *ms = 10)
SET(cudaStreamAddCallback, (cudaStream_t s, cudaStreamCallback_t run, void *data, unsigned flags),
    run(s, cudaSuccess, data))

/* Capture: one at a time. A stream that waits for an event of the capturing one joins it. */
static unsigned long long captures;
static cudaStream_t origin, joined[64];
static int capturing, joins;
static struct { cudaEvent_t event; } recorded[64];
static int records;

static int is_captured(cudaStream_t stream) {
  if (!capturing) return 0;
  if (stream == origin) return 1;
  for (int i = 0; i < joins; i++)
    if (joined[i] == stream) return 1;
  return 0;
}

/* Kernels are counted, so that a test can tell what ran: those of a graph at each replay. */
typedef struct {
  long kernels;
} Graph;
static long captured, replays, replayed;
long standin_replays(void) { return replays; }          /* graphs that were replayed */
long standin_replayed_kernels(void) { return replayed; } /* kernels in them */

SET(cudaStreamBeginCapture, (cudaStream_t stream, enum cudaStreamCaptureMode mode),
    origin = stream; capturing = 1; joins = records = 0; captures++; captured = 0)

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Graph *made = malloc(sizeof *made);
  made->kernels = captured;
  capturing = 0;
  *graph = (cudaGraph_t)made;
  return cudaSuccess;
}

static cudaError_t launch(void) {
  captured += capturing;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  if (is_captured(stream)) recorded[records++ % 64].event = event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  for (int i = 0; capturing && i < records && i < 64; i++)
    if (recorded[i].event == event && !is_captured(stream)) joined[joins++ % 64] = stream;
  return cudaSuccess;
}
SET(cudaStreamIsCapturing, (cudaStream_t stream, enum cudaStreamCaptureStatus *status),
    *status = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone)

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = captures;
  if (graph) *graph = (cudaGraph_t)0x77;
  if (nodes) *nodes = 0;
  if (edges) *edges = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
SET(cudaGraphInstantiate, (cudaGraphExec_t *e, cudaGraph_t graph, unsigned long long flags),
    *e = (cudaGraphExec_t)graph)
SET(cudaGraphInstantiateWithFlags, (cudaGraphExec_t *e, cudaGraph_t graph, unsigned long long f),
    *e = (cudaGraphExec_t)graph)
SET(cudaGraphGetNodes, (cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count),
    if (!nodes) *count = 1)
SET(cudaGraphLaunch, (cudaGraphExec_t graph, cudaStream_t stream),
    replays++; replayed += ((Graph *)graph)->kernels)

SET(cudaLaunchKernel, (const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s), launch())
SET(__cudaLaunchKernel, (const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s),
    launch())
SET(cudaLaunchKernelExC, (const cudaLaunchConfig_t *config, const void *f, void **a), launch())
SET(cudaLaunchHostFunc, (cudaStream_t stream, cudaHostFn_t run, void *data),
    if (!capturing) run(data))
SET(__cudaGetKernel, (cudaKernel_t *kernel, const void *function), *kernel = (void *)function)
SET(cudaGetSymbolAddress, (void **pointer, const void *symbol), *pointer = (void *)symbol)
SET(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags,
    (int *blocks, const void *f, int size, size_t shared, unsigned flags), *blocks = 2)

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { return handle(); }

/* `kernel<<<grid, block>>>` pushes its configuration and pops it in the kernel's host stub. */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
SET(__cudaPopCallConfiguration, (dim3 *grid, dim3 *block, size_t *shared, void **stream),
    *grid = configuration.grid; *block = configuration.block; *shared = configuration.shared;
    *stream = configuration.stream)

const char *cudaGetErrorString(cudaError_t e) { return e ? "stand-in device: error" : "no error"; }
const char *cudaGetErrorName(cudaError_t e) { return e ? "cudaErrorStandIn" : "cudaSuccess"; }
SET(cudaDeviceGetDefaultMemPool, (cudaMemPool_t *pool, int device), *pool = handle())
SET(cudaMemPoolGetAttribute, (cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value),
    *(unsigned long long *)value = 0)

/* A driver function by name: ours, or one that does nothing. */
static int nothing(void) { return 0; }
static void *driver_function(const char *name) {
  char newer[256];
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY), *found = 0;
  snprintf(newer, sizeof newer, "%s_v2", name);
  if (driver && !(found = dlsym(driver, newer))) found = dlsym(driver, name);
  return found ? found : (void *)nothing;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = driver_function(name);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* -- cuBLAS ------------------------------------------------------------------------------------ */

int cublasCreate_v2(void **h) { *h = handle(); return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
/* PyTorch frees these with a function that does nothing here: 64 bytes a product are lost. */
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { *d = calloc(1, 64); return 0; }
int cublasLtMatmulPreferenceCreate(void **d) { *d = calloc(1, 64); return 0; }
int cublasLtMatrixLayoutCreate(void **d, int type, unsigned long rows, unsigned long columns,
                               long stride) {
  *d = calloc(1, 64);
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *A, void *B, void *C, void *D, void *p,
                                   int asked, void *results, int *count) {
  memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: success, no workspace */
  *count = 1;
  return 0;
}

/* -- Driver API -------------------------------------------------------------------------------- */

#define DRV(function, arguments, ...) \
  CUresult function arguments { __VA_ARGS__; return CUDA_SUCCESS; }

DRV(cuDeviceGet, (CUdevice *device, int number), *device = 0)
DRV(cuDeviceGetCount, (int *count), *count = 1)
DRV(cuDriverGetVersion, (int *version), *version = 13000)
DRV(cuDeviceGetName, (char *name, int size, CUdevice device), snprintf(name, size, NAME))
DRV(cuDeviceGetAttribute, (int *value, CUdevice_attribute which, CUdevice device),
    *value = attribute(which))
DRV(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device), *context = (CUcontext)0x11)
DRV(cuDevicePrimaryCtxGetState, (CUdevice device, unsigned *flags, int *active),
    *flags = 0; *active = 1)
DRV(cuCtxGetCurrent, (CUcontext *context), *context = (CUcontext)0x11)
DRV(cuCtxGetDevice, (CUdevice *device), *device = 0)
DRV(cuCtxGetLimit, (size_t *value, CUlimit limit), *value = 1048576)
DRV(cuModuleLoad, (CUmodule *module, const char *file), *module = handle())
DRV(cuModuleLoadData, (CUmodule *module, const void *image), *module = handle())
DRV(cuModuleLoadDataEx, (CUmodule *module, const void *image, unsigned n, CUjit_option *options,
    void **values), *module = handle())
DRV(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name),
    *function = handle())
DRV(cuFuncGetAttribute, (int *value, CUfunction_attribute which, CUfunction function),
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32 : 0)
DRV(cuLaunchKernel, (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
    unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra), launch())
DRV(cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction f, void **arguments, void **extra),
    launch())
DRV(cuOccupancyMaxActiveClusters, (int *n, CUfunction f, const CUlaunchConfig *config), *n = 66)
DRV(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *n, CUfunction f, int size, size_t shared),
    *n = 2)
DRV(cuGetErrorString, (CUresult error, const char **text), *text = "stand-in device")
DRV(cuGetErrorName, (CUresult error, const char **text), *text = "stand-in device")
DRV(cuMemGetAllocationGranularity, (size_t *size, const CUmemAllocationProp *properties,
    CUmemAllocationGranularity_flags flags), *size = 2 << 20)
DRV(cuTensorMapEncodeTiled, (CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s,
    CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f), memset(map, 0, sizeof *map))
DRV(cuPointerGetAttribute, (void *value, CUpointer_attribute which, CUdeviceptr pointer),
    if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)value = CU_MEMORYTYPE_DEVICE;
    else memset(value, 0, 8))
DRV(cuGetProcAddress_v2, (const char *name, void **function, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *result),
    *function = driver_function(name);
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS)
