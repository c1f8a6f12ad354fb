// A libcuda.so.1 whose one device is the CPU, for tests: what PycudaDevice asks of pycuda and of the driver is
// really carried out, on the kernels of the library named by CUDA_ON_CPU_KERNELS. Included by fake_driver.py
// after functions of all other names, which say that there is no device.
//
// What is queued on a stream is done when somebody waits for it and not before, so that a wait that was
// forgotten shows; an event stands for what its stream had been given by then, and no more. The default stream
// works at once, after what it was told to wait for.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr int invalid_value = 1, not_found = 500, launch_failed = 719, not_permitted = 800;

using Launch = const char *(const char *, const unsigned *, const unsigned *, unsigned long long, const char *, void **,
                            unsigned);
using Graph = std::vector<std::function<int()>>;

void *kernels() {
    static void *const library = dlopen(std::getenv("CUDA_ON_CPU_KERNELS"), RTLD_NOW);
    return library;
}

const char *kinds(const char *name) {
    return reinterpret_cast<const char *(*)(const char *)>(dlsym(kernels(), "cuda_on_cpu_kinds"))(name);
}

thread_local int context_depth = 0;
int the_context, the_module;  // only their addresses matter

struct Stream {
    Graph *capture = nullptr;
    std::deque<std::function<int()>> pending;
    std::atomic<std::size_t> given = 0, done = 0;  // pieces of work, since the stream was made
    std::recursive_mutex working;
    bool busy = false;  // a host function is running, and may come back here through Python's garbage
};

std::mutex of_streams;
std::set<Stream *> streams;

// The default stream has three names.
bool is_default(const Stream *stream) { return reinterpret_cast<std::uintptr_t>(stream) <= 2; }

bool exists(Stream *stream) {
    const std::lock_guard lock(of_streams);
    return streams.count(stream) > 0;
}

struct Event {
    Stream *stream = nullptr;
    std::size_t until = 0;  // work of the stream
};

constexpr std::size_t all_work = ~std::size_t{0};

int finish(Stream *stream, std::size_t until = all_work);

std::vector<Event> awaited;  // by the default stream

int settle_default() {
    std::vector<Event> events;
    {
        const std::lock_guard lock(of_streams);
        events.swap(awaited);
    }
    int status = 0;
    for (const Event &event : events)
        if (const int failed = finish(event.stream, event.until)) status = failed == 400 ? status : failed;  // gone is done
    return status;
}

int finish(Stream *stream, std::size_t until) {
    if (is_default(stream)) return settle_default();
    if (!exists(stream)) return 400;  // invalid handle
    if (until != all_work && stream->done >= until) return 0;  // asks for no lock: two streams may await each other
    const std::lock_guard lock(stream->working);
    if (stream->capture) return not_permitted;
    if (stream->busy) return 0;
    int status = 0;
    stream->busy = true;
    while (!stream->pending.empty() && stream->done < until) {
        const auto work = std::move(stream->pending.front());
        stream->pending.pop_front();
        if (const int failed = work()) status = failed;
        ++stream->done;
    }
    stream->busy = false;
    return status;
}

// Whether all streams are done. Who calls may hold Python's lock, which the work of another thread may need,
// so that is not waited for.
bool finish_all() {
    std::set<Stream *> all;
    {
        const std::lock_guard lock(of_streams);
        all = streams;
    }
    bool done = true;
    for (Stream *stream : all) {
        const std::unique_lock working(stream->working, std::try_to_lock);
        done = working && !stream->busy && !finish(stream) && done;
    }
    return done;
}

// Kept until somebody waits, or for the graph when the stream is being captured.
int queue(Stream *stream, std::function<int()> work) {
    if (!context_depth) return 201;  // invalid context
    if (is_default(stream)) {
        const int status = settle_default();
        return status ? status : work();
    }
    if (!exists(stream)) return 400;
    const std::lock_guard lock(stream->working);
    if (stream->capture) stream->capture->push_back(std::move(work));
    else stream->pending.push_back(std::move(work)), ++stream->given;
    return 0;
}

}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? 101 : 0; }
int cuDeviceComputeCapability(int *major, int *minor, int) { return *major = 8, *minor = 9, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? 8 : 9; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    return attribute == 75 || attribute == 76 ? 0 : 100;
}
int cuDeviceGetName(char *name, int length, int) { return std::strncpy(name, "CPU", static_cast<std::size_t>(length)), 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &the_context, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void *) { return ++context_depth, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = &the_context, context_depth-- > 0 ? 0 : 201; }
int cuCtxGetCurrent(void **context) { return *context = context_depth ? &the_context : nullptr, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuCtxSynchronize() { return finish_all(), 0; }
int cuMemAlloc_v2(std::uint64_t *address, std::size_t size) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, size)) return 2;
    std::memset(memory, 0xff, size);
    return *address = reinterpret_cast<std::uint64_t>(memory), 0;
}
int cuMemFree_v2(std::uint64_t address) {
    if (!context_depth) return 201;
    if (finish_all()) std::free(reinterpret_cast<void *>(address));
    return 0;
}
int cuMemAllocHost_v2(void **memory, std::size_t size) { return posix_memalign(memory, 4096, size) ? 2 : 0; }
int cuMemHostAlloc(void **memory, std::size_t size, unsigned) { return cuMemAllocHost_v2(memory, size); }
int cuMemFreeHost(void *memory) { return context_depth ? (std::free(memory), 0) : 201; }
int cuMemcpyHtoDAsync_v2(std::uint64_t target, const void *source, std::size_t size, Stream *stream) {
    return queue(stream, [=] { return std::memcpy(reinterpret_cast<void *>(target), source, size), 0; });
}
int cuMemcpyDtoHAsync_v2(void *target, std::uint64_t source, std::size_t size, Stream *stream) {
    return queue(stream, [=] { return std::memcpy(target, reinterpret_cast<const void *>(source), size), 0; });
}
int cuMemcpyHtoD_v2(std::uint64_t target, const void *source, std::size_t size) {
    return queue(nullptr, [=] { return std::memcpy(reinterpret_cast<void *>(target), source, size), 0; });
}
int cuMemcpyDtoH_v2(void *target, std::uint64_t source, std::size_t size) {
    return queue(nullptr, [=] { return std::memcpy(target, reinterpret_cast<const void *>(source), size), 0; });
}
int cuMemsetD32Async(std::uint64_t target, unsigned value, std::size_t count, Stream *stream) {
    return queue(stream, [=] {
        for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned *>(target)[i] = value;
        return 0;
    });
}
int cuStreamCreate(Stream **stream, unsigned) {
    *stream = new Stream;
    const std::lock_guard lock(of_streams);
    return streams.insert(*stream), 0;
}
int cuStreamDestroy_v2(Stream *stream) {
    if (const int status = finish(stream)) return status;
    const std::lock_guard lock(of_streams);
    return streams.erase(stream), 0;  // not deleted: another thread may be looking at it
}
int cuStreamSynchronize(Stream *stream) { return finish(stream); }
int cuEventCreate(Event **event, unsigned) { return *event = new Event, 0; }
int cuEventRecord(Event *event, Stream *stream) {
    return *event = {stream, is_default(stream) ? 0 : stream->given.load()}, 0;
}
int cuEventSynchronize(Event *event) { return event->stream ? finish(event->stream, event->until) : 0; }
int cuEventDestroy_v2(Event *event) { return delete event, 0; }
int cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
    if (!event->stream) return 0;
    if (!is_default(stream)) return queue(stream, [earlier = *event] { return finish(earlier.stream, earlier.until); });
    const std::lock_guard lock(of_streams);
    return awaited.push_back(*event), 0;
}
int cuLaunchHostFunc(Stream *stream, void (*function)(void *), void *argument) {
    return queue(stream, [=] { return function(argument), 0; });
}
int cuModuleLoadData(void **module, const void *image) {
    // What nvcc writes begins with this number; anything else is not a fat binary.
    unsigned magic;
    std::memcpy(&magic, image, sizeof magic);
    return *module = &the_module, magic == 0xba55ed50u ? 0 : 200;
}
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(char **function, void *, const char *name) {
    return kinds(name) ? (*function = strdup(name), 0) : not_found;
}
int cuFuncGetAttribute(int *value, int, char *) { return *value = 32, 0; }
int cuLaunchKernel(char *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream *stream, void **parameters, void **) {
    const std::string name = function, letters = kinds(function);
    std::vector<std::uint64_t> values(letters.size());
    for (std::size_t i = 0; i < letters.size(); ++i)
        std::memcpy(&values[i], parameters[i], std::string("iIf").find(letters[i]) == std::string::npos ? 8 : 4);
    return queue(stream, [=]() mutable {
        const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
        std::vector<void *> pointers;
        for (std::uint64_t &value : values) pointers.push_back(&value);
        const auto launch = reinterpret_cast<Launch *>(dlsym(kernels(), "cuda_on_cpu_launch"));
        return *launch(name.c_str(), grid, block, shared, letters.c_str(), pointers.data(), 0) ? launch_failed : 0;
    });
}
int cuStreamBeginCapture_v2(Stream *stream, int) {
    if (is_default(stream) || !exists(stream) || stream->capture) return not_permitted;
    return stream->capture = new Graph, 0;
}
int cuStreamIsCapturing(Stream *stream, int *status) { return *status = !is_default(stream) && stream->capture, 0; }
int cuStreamEndCapture(Stream *stream, Graph **graph) {
    *graph = stream->capture;
    stream->capture = nullptr;
    return *graph ? 0 : not_permitted;
}
int cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long) {
    return *executable = new Graph(*graph), 0;
}
int cuGraphDestroy(Graph *graph) { return delete graph, 0; }
int cuGraphExecDestroy(Graph *graph) { return delete graph, 0; }
int cuGraphLaunch(Graph *graph, Stream *stream) {
    for (const auto &work : *graph)
        if (const int status = queue(stream, work)) return status;
    return 0;
}
int cuGetErrorString(int error, const char **text) {
    return *text = error == 100 ? "no CUDA-capable device is detected" : "an error of the driver on the CPU", 0;
}
int cuGetErrorName(int, const char **text) { return *text = "CUDA_ERROR", 0; }
}
