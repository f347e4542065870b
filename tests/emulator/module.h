// Where a library of kernels has its shared memory. A generated source includes this, and defines
// `dynamic_shared`: where its kernels have dynamic shared memory.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstddef>

extern char* dynamic_shared(int number);  // null behind the last
constexpr int MAX_DYNAMIC = 2;

struct Module {  // as runtime.h has it
    char *tls, *image, *image_end;
    size_t tls_size;
    char* dynamic[MAX_DYNAMIC];
    size_t dynamic_size;
};

inline int find_module(dl_phdr_info* info, size_t, void* data) {
    Module& module = *static_cast<Module*>(data);
    char *begin = nullptr, *end = nullptr, *base = reinterpret_cast<char*>(info->dlpi_addr);
    size_t tls_size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_TLS) tls_size = header.p_memsz;
        if (header.p_type != PT_LOAD) continue;
        if (begin == nullptr) begin = base + header.p_vaddr;
        end = base + header.p_vaddr + header.p_memsz;
    }
    char* here = reinterpret_cast<char*>(&find_module);
    if (here < begin || here >= end) return 0;
    module.image = begin;
    module.image_end = end;
    module.tls = static_cast<char*>(info->dlpi_tls_data);
    module.tls_size = tls_size;
    return 1;
}

extern "C" __attribute__((visibility("default"))) void describe(Module* module, size_t dynamic_size) {
    *module = {};
    for (int i = 0; i < MAX_DYNAMIC; ++i) module->dynamic[i] = dynamic_shared(i);  // makes the memory, too
    std::sort(module->dynamic, module->dynamic + MAX_DYNAMIC,
              [](char* a, char* b) { return b == nullptr ? a != nullptr : a != nullptr && a < b; });
    module->dynamic_size = dynamic_size;
    dl_iterate_phdr(find_module, module);
}
