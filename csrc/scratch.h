// One block of memory, laid out by the same code twice: first to measure it, then to hand it out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace HDC_ISA {

class Scratch {
    static constexpr size_t ALIGNMENT = 64;
    char* memory = nullptr;
    size_t used = 0, most = ALIGNMENT;

  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory); }

    // Begins a layout. Before `allocate` the pointers it hands out are null.
    void rewind() { used = 0; }

    template <typename T>
    void take(T*& pointer, int64_t count) {
        pointer = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += (size_t(count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        most = std::max(most, used);
    }

    // Gets as much as the largest layout so far needs; false if there is not so much.
    bool allocate() {
        memory = static_cast<char*>(std::aligned_alloc(ALIGNMENT, most));
        return memory != nullptr;
    }
};

}  // namespace HDC_ISA
