/* A stand-in for the management library (NVML), by which vLLM finds its platform: one H100. */
#include <stdio.h>
#include <string.h>

#define TOTAL 85520809984ULL
#define SET(function, arguments, ...) int function arguments { __VA_ARGS__; return 0; }

SET(nvmlInit_v2, (void), )
SET(nvmlInitWithFlags, (unsigned flags), )
SET(nvmlShutdown, (void), )
SET(nvmlDeviceGetCount_v2, (unsigned *count), *count = 1)
SET(nvmlDeviceGetHandleByIndex_v2, (unsigned index, void **device), *device = (void *)0x1000)
SET(nvmlDeviceGetHandleByUUID, (const char *uuid, void **device), *device = (void *)0x1000)
SET(nvmlDeviceGetIndex, (void *device, unsigned *index), *index = 0)
SET(nvmlDeviceGetCudaComputeCapability, (void *device, int *major, int *minor),
    *major = 9; *minor = 0)
SET(nvmlDeviceGetName, (void *device, char *name, unsigned size),
    snprintf(name, size, "NVIDIA H100 80GB HBM3"))
SET(nvmlDeviceGetUUID, (void *device, char *uuid, unsigned size),
    snprintf(uuid, size, "GPU-00000000-0000-0000-0000-000000000000"))
SET(nvmlDeviceGetP2PStatus, (void *a, void *b, int index, int *status), *status = 0)
SET(nvmlSystemGetDriverVersion, (char *version, unsigned size), snprintf(version, size, "580.159"))

typedef struct {
  unsigned long long total, free, used;
} Memory;
SET(nvmlDeviceGetMemoryInfo, (void *device, Memory *memory),
    *memory = (Memory){TOTAL, TOTAL - (512ULL << 20), 512ULL << 20})
